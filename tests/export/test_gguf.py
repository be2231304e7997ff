"""The GGUF is what llama.cpp's own converter makes of the merged model, without a merged copy."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import official, tiny_models
from support.commands import killed_after
from support.official import metadata, tensors
from support.tiny_models import tiny_adapter, tiny_model

from autosloth.errors import ExportError
from autosloth.export import gguf, llama
from autosloth.export.quantize import Weight
from autosloth.export.stored_types import stored_otherwise
from autosloth.models import CHAT_TEMPLATES
from autosloth.proof import tensors as weights
from autosloth.proof.verdict import cure
from autosloth.run import Run, read_json
from autosloth.weights.lora import Adapter
from autosloth.weights.stored import Plain
from autosloth.weights.streamed import Shards


def merged_by_peft(base, adapter, folder, kind):
    """What PEFT's merge, `save_pretrained` and llama.cpp's converter make of a base and an adapter, in the base's dtype."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder)
    for path in gguf.tokenizer_of(adapter):
        shutil.copyfile(path, folder / path.name)
    official.converted((folder, folder / "merged.gguf", kind))
    return folder / "merged.gguf"


def converted(base, adapter, folder, *kinds, name="tiny"):
    """Our files of a base and an adapter, by type."""
    run = SimpleNamespace(settings=SimpleNamespace(run_name=name), path=lambda part: {"adapter": adapter}[part])
    files = {kind: folder / f"{kind}.gguf" for kind in kinds}
    gguf.lay_source(folder / name, base, adapter)
    gguf.convert(run, folder / name, files, run.path("adapter"))
    return files


def test_the_streamed_file_holds_the_same_bits_as_the_merged_model_converted(engine, finished, base, tmp_path):
    ours = tensors(next((finished / "gguf").glob("*.gguf")))
    assert ours == tensors(merged_by_peft(base, finished / "adapter", tmp_path, "q8_0"))
    assert {kind for kind, _ in ours.values()} == {"Q8_0", "F32"}


@pytest.mark.slow
def test_stacks_of_experts_that_the_adapter_changes_are_made_and_compared_row_by_row(engine, tmp_path, monkeypatch):
    """In float32, the precision in which PEFT's merge of a stack is not rounded on its way."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    base, tuned = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    tokenizer = tiny_models.tiny_tokenizer("qwen2", base)
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    sizes = tiny_models.SIZES | tiny_models.HEADS | {"vocab_size": len(tokenizer), "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes, **experts, eos_token_id=tokenizer.eos_token_id))
    model.save_pretrained(base)
    stacked = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(stacked, base / "model.safetensors", {"format": "pt"})  # transformers itself would save each expert alone
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], target_parameters=parameters))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(tuned)
    for path in gguf.tokenizer_of(base):
        shutil.copyfile(path, tuned / path.name)

    adapter, (experts, height, width) = Adapter.read(tuned, base), stacked[STACK].shape
    assert Weight(STACK, Plain("", 0, "float32", (experts, height, width)), adapter, Shards(base)).has_rows
    ours = converted(base, tuned, tmp_path, "q8_0")["q8_0"]
    (tmp_path / "official").mkdir()
    assert tensors(ours) == tensors(merged_by_peft(base, tuned, tmp_path / "official", "q8_0"))
    monkeypatch.setattr(weights, "WHOLE_UP_TO", 0)
    compared = weights.compare_weights(ours, tmp_path / "tiny", tuned)
    assert compared["form"] == "rows" and not compared["failures"] and compared["adapter_share"] > 0.99
    without = weights.compare_weights(ours, tmp_path / "tiny", None)
    assert any("ffn_gate_exps" in failure for failure in without["failures"]), without["failures"]


STACK = "model.layers.0.mlp.experts.gate_up_proj"


def test_mixtures_are_those_that_llama_cpp_makes_of_a_16_bit_file(engine, tmp_path, monkeypatch):
    wide = {"hidden_size": 256, "intermediate_size": 512}  # k-quants take 256 weights together
    monkeypatch.setattr(tiny_models, "SIZES", tiny_models.SIZES | wide)
    base = tiny_model("mistral", tmp_path / "base", dtype="bfloat16", steps=0)
    adapter = tiny_adapter(base, tmp_path / "adapter")
    files = converted(base, adapter, tmp_path, "bf16", "q4_k_m", "q3_k_m", "q8_0", "adapter")
    for kind in ("q4_k_m", "q3_k_m"):
        expected = tmp_path / f"expected-{kind}.gguf"
        official.quantized(files["bf16"], expected, kind)
        ours = tensors(files[kind])
        assert ours == tensors(expected)
        assert len({chosen for chosen, _ in ours.values()}) > 2, "several types, as llama.cpp mixes them"
        assert metadata(files[kind]) == metadata(expected)
        assert stored_otherwise(files[kind], kind) == ""
    assert len(tensors(files["adapter"])) == 2 * 2 * 7, "A and B of seven layers in each of two blocks"


def test_types_that_are_not_those_of_the_name_are_told(engine, tmp_path):
    base = tiny_model("mistral", tmp_path / "base", dtype="bfloat16", steps=0)
    files = converted(base, tiny_adapter(base, tmp_path / "adapter"), tmp_path, "q4_k_m", "q8_0", "bf16", "adapter")
    told = {kind: stored_otherwise(file, kind) for kind, file in files.items()}
    assert told["q8_0"] == told["bf16"] == told["adapter"] == ""
    start = "named Q4_K_M, but 16 of 16 matrices have rows that are no multiple of 256 and are stored otherwise, "
    assert told["q4_k_m"] == f"{start}13 as Q5_0 and 3 as Q8_0", told


def with_large_weights(base, folder):
    """The same model by its answers: a row of one matrix is larger than float16's numbers, what it feeds as much smaller."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    for name, rows, times in (("up", (0, slice(None)), 2.0**24), ("down", (slice(None), 0), 2.0**-24)):
        weights[f"model.layers.0.mlp.{name}_proj.weight"][rows] *= times
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_weights_that_float16_has_no_number_for_are_refused_in_that_type_alone(engine, tmp_path):
    base = with_large_weights(tiny_model("mistral", tmp_path / "plain", dtype="bfloat16", steps=0), tmp_path / "base")
    adapter = tiny_adapter(base, tmp_path / "adapter")
    with pytest.raises(ExportError) as error:
        converted(base, adapter, tmp_path, "f16", "q8_0")
    assert error.value.what.startswith("The merged weights are too large for the type F16: one has a size of ")
    assert error.value.todo == "Take `bf16` or `q8_0` in place of `f16` in `quantizations`."
    assert not list(tmp_path.glob("*.gguf*"))
    files = converted(base, adapter, tmp_path, "bf16", "q8_0", name="again")
    for file in files.values():
        assert not weights.compare_weights(file, tmp_path / "again", adapter)["failures"]


def test_what_is_infinite_in_another_ones_f16_is_named(engine, tmp_path):
    base = with_large_weights(tiny_model("mistral", tmp_path / "plain", dtype="bfloat16", steps=0), tmp_path / "base")
    official.converted((base, tmp_path / "theirs.gguf", "f16"))
    (failure,) = weights.compare_weights(tmp_path / "theirs.gguf", base, None)["failures"]
    assert "blk.0.ffn_up.weight holds weights of " in failure and "too large for F16, which ends at 65504" in failure
    assert cure([failure]) == "Take `bf16` or `q8_0` in place of `f16` in `quantizations`."


def test_a_float16_base_that_grows_beyond_its_type_is_packed_as_it_is_merged(engine, tmp_path):
    """As merged/ is then in bfloat16, the file is no more narrow than that."""
    from safetensors.torch import load_file, save_file

    base = tiny_model("mistral", tmp_path / "base", dtype="float16", steps=0)
    adapter = tiny_adapter(base, tmp_path / "adapter")
    pairs = load_file(adapter / "adapter_model.safetensors")
    pairs = {name: pair * 1000 if "layers.0.mlp.up_proj" in name else pair for name, pair in pairs.items()}
    save_file(pairs, adapter / "adapter_model.safetensors")
    file = converted(base, adapter, tmp_path, "q8_0")["q8_0"]
    told = weights.compare_weights(file, tmp_path / "tiny", adapter)
    assert not told["failures"] and told["adapter_share"] == pytest.approx(1, abs=0.01)


def test_the_facts_name_the_file_its_size_and_what_it_took(finished):
    (made,) = read_json(finished / "facts.json")["export"]["gguf"]
    path = finished / made["path"]
    assert made["type"] == "Q8_0" and path.name == "short-Q8_0.gguf"
    assert made["bytes"] == path.stat().st_size and made["seconds"] > 0
    assert 0.1 < made["peak_anonymous_gb"] < 1.0 and made["peak_ram_gb"] < 2


def test_nothing_but_the_file_and_the_modelfile_is_left(finished):
    assert sorted(path.name for path in (finished / "gguf").iterdir()) == ["Modelfile", "short-Q8_0.gguf"]


def test_the_modelfile_names_the_file_and_the_end_token(finished):
    text = (finished / "gguf" / "Modelfile").read_text()
    assert text.startswith("FROM ./short-Q8_0.gguf\n") and text.endswith('PARAMETER stop "</s>"\n')
    assert '### Response:\n"""' in text, "the prompt must end as in training, with a line break"


def test_the_modelfile_stops_at_every_end_token_and_samples_as_the_base_wants_it(finished, tmp_path, copied):
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "eos_token_id": [2, 5]}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    rows = read_json(copied / "reference" / "rows.json")
    (copied / "reference" / "rows.json").write_text(json.dumps(rows | {"ends": [2, 0]}))
    (copied / "adapter" / "chat_template.jinja").write_text("{{ messages }}")
    lines = gguf.modelfile(Run.open(copied), tmp_path, "gguf/x.gguf").splitlines()
    assert lines[0] == "FROM ./x.gguf" and lines[-2:] == ['PARAMETER stop "</s>"', 'PARAMETER stop "<unk>"']
    assert lines[2:-2] == ["PARAMETER temperature 0.6", "PARAMETER top_p 0.9", "PARAMETER repeat_penalty 1.1"]


CHATS = [
    [{"role": "user", "content": "One?"}],
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "One?"}],
    [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Uno."},
        {"role": "user", "content": "Two?"},
    ],
]


@pytest.mark.parametrize("chat", CHATS, ids=["one turn", "system", "two turns"])
@pytest.mark.parametrize("name", ["alpaca", "mistral", "zephyr"])
def test_the_template_for_ollama_renders_what_was_trained(name, chat):
    """Go's template language is read as far as these templates use it; Ollama adds the BOS token itself."""
    import jinja2

    jinja = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        (CHAT_TEMPLATES / f"{name}.jinja").read_text().rstrip("\n")
    )
    trained = jinja.render(messages=chat, bos_token="", eos_token="</s>", add_generation_prompt=True)
    assert render_go((CHAT_TEMPLATES / f"{name}.ollama").read_text(), chat) == trained


def render_go(text, messages):
    """A Go template of range, if, else, eq, assignment of $system and fields, by way of jinja2."""
    import jinja2

    swaps = {
        "{{ range .Messages }}": "{% for m in messages %}",
        '{{ if eq .Role "system" }}': "{% if m.role == 'system' %}",
        '{{ else if eq .Role "user" }}': "{% elif m.role == 'user' %}",
        '{{ else if eq .Role "assistant" }}': "{% elif m.role == 'assistant' %}",
        "{{ end }}{{ end }}": "{% endif %}{% endfor %}",
        "{{ end }}": "{% endfor %}",
        "{{ .Content }}": "{{ m.content }}",
        "{{ .Role }}": "{{ m.role }}",
        '{{ $system := "" }}': "{% set ns = namespace(system='') %}",
        '{{ $system = "" }}': "{% set ns.system = '' %}",
        '{{ $system = printf "%s\\n\\n" .Content }}': "{% set ns.system = m.content + '\\n\\n' %}",
        "{{ $system }}": "{{ ns.system }}",
    }
    for go, jinja in swaps.items():
        text = text.replace(go, jinja)
    return jinja2.Environment(keep_trailing_newline=True).from_string(text).render(messages=messages)


def test_the_file_does_not_carry_the_name_of_a_temporary_folder(finished):
    assert b".source-" not in next((finished / "gguf").glob("*.gguf")).read_bytes()


def test_a_failed_conversion_is_named_and_leaves_what_was_there(copied):
    before = {path.name: path.read_bytes() for path in (copied / "gguf").iterdir()}
    (copied / "adapter" / "tokenizer.json").write_text("{}")
    (copied / "adapter" / "tokenizer.model").write_bytes(b"no tokenizer")
    mark = Run.open(copied).mark("train") | {"files": {}}  # or the files would be refused for their size
    (copied / ".done" / "train.json").write_text(json.dumps(mark))
    with pytest.raises(ExportError, match="conversion to GGUF failed"):
        gguf.write_gguf.again(Run.open(copied))
    assert {path.name: path.read_bytes() for path in (copied / "gguf").iterdir()} == before
    assert not list(copied.rglob(".*.partial")) and Run.open(copied).mark("gguf") is None


def test_without_quantizations_there_is_no_gguf(copied, cli):
    run = Run.open(copied)
    run.settings = run.settings.model_copy(update={"quantizations": []})
    gguf.write_gguf(run)
    assert run.facts["export"]["gguf"] == [] and list((copied / "gguf").iterdir()) == []


def test_a_base_that_is_cut_short_is_told(tmp_path):
    import numpy

    path = tmp_path / "model.safetensors"
    numpy.zeros(100, "float32").tofile(path)
    whole, short = (
        Weight("w", Plain(str(path), at, "float32", (12, 8)), Adapter(), Shards(tmp_path)) for at in (16, 20)
    )
    assert whole.rows(numpy.array([11])).tolist() == [[0.0] * 8]
    with pytest.raises(ExportError, match="cut short"):
        short.rows(numpy.array([11]))


GRAPHS = """
import sys
sys.path[:0] = sys.argv[1:3]
import numpy, torch
from conversion.base import LazyTorchTensor
from autosloth.export import selection
from autosloth.weights.lora import Adapter
from autosloth.export.quantize import Weight
from autosloth.export.stored_types import stored_otherwise
from autosloth.weights.stored import Plain
from autosloth.weights.streamed import Shards
from pathlib import Path

shape = (12, 8)
numpy.random.default_rng(0).standard_normal((24, 8), dtype="float32").tofile("weights")
def lazy(offset):
    weight = Weight("w", Plain("weights", offset, "float32", shape), Adapter(), Shards(Path("here")))
    return LazyTorchTensor(meta=LazyTorchTensor.meta_with_dtype_and_shape(torch.float32, shape), args=(weight,), func=Weight.whole)
for name, graph in {
    "as it is": lambda a, b: a,
    "pairs of heads": lambda a, b: a.reshape(2, 2, 3, 8).swapaxes(1, 2).reshape(12, 8),
    "a part": lambda a, b: a[3:9],
    "a stack": lambda a, b: torch.stack([b, a]),
    "one above the other": lambda a, b: torch.cat([b[2:], a], dim=0),
    "size": lambda a, b: a.abs(),
    "sum": lambda a, b: a + 1,
    "double": lambda a, b: a * 2,
    "in place": lambda a, b: a.mul_(2),
    "rounded": lambda a, b: a.to(torch.bfloat16).to(torch.float32),
    "cut off": lambda a, b: a.clamp(-0.3, 0.3),
    "columns turned": lambda a, b: a.flip(1),
    "side by side": lambda a, b: torch.cat([a, b], dim=1),
    "transposed": lambda a, b: a[:8].T,
}.items():
    made = graph(lazy(0), lazy(12 * 8 * 4)).numpy()
    chosen = selection.choose_rows(made)
    right = chosen and numpy.array_equal(chosen.rows(0, chosen.shape[0]), type(made).to_eager(made).reshape(-1, made.shape[-1]))
    print(name, "rows" if right else "computed" if chosen is None else "WRONG", sep=": ")
"""


def test_a_choice_of_rows_is_told_from_arithmetic(tmp_path):
    converter = llama.fetch_converter()
    command = [sys.executable, "-c", GRAPHS, converter, converter / "gguf-py"]
    paths = {"PYTHONPATH": str(Path(gguf.__file__).parents[2])}
    said = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | paths)
    found = dict(line.split(": ") for line in said.stdout.splitlines())
    moved = ["as it is", "pairs of heads", "a part", "a stack", "one above the other"]
    assert len(found) == 14 and found == {name: "rows" if name in moved else "computed" for name in found}, said.stderr


def test_a_killed_conversion_leaves_nothing_new_that_is_called_a_gguf(copied):
    before = {path.name: path.read_bytes() for path in (copied / "gguf").iterdir()}
    half = copied / ".gguf.partial" / ".short-Q8_0.gguf.partial"
    killed_after(half, "export", copied)
    assert [path for path in half.parent.iterdir() if path.is_file()] == [half]
    Run.create(Run.open(copied).settings.model_copy(update={"storage": str(copied.parent)}))
    assert {path.name: path.read_bytes() for path in (copied / "gguf").iterdir()} == before
    assert not list(copied.rglob(".*.partial"))


FULL = """
import collections, json, shutil, sys
from autosloth.errors import AutoSlothError
from autosloth.export import convert
usage = collections.namedtuple("usage", "total used free")
shutil.disk_usage = lambda path: usage(10**6, 10**6 - 1000, 1000)
try:
    convert.main(json.loads(sys.argv[1]))
except AutoSlothError as error:
    print(error)
"""


def test_a_disk_that_is_too_small_is_known_before_weights_are_written(finished, base, tmp_path):
    adapter, path = finished / "adapter", tmp_path / "full.gguf"
    gguf.lay_source(tmp_path / "source", base, adapter)
    request = {"converter": str(llama.fetch_converter()), "source": str(tmp_path / "source"), "adapter": str(adapter)}
    request |= {"name": "full", "files": {"q8_0": str(path)}}
    said = subprocess.run([sys.executable, "-c", FULL, json.dumps(request)], capture_output=True, text=True)
    assert "0.00 GB are free" in said.stdout and "`quantizations: [adapter]`" in said.stdout, said.stderr
    assert path.stat().st_size < 200_000, "no more than its head"


TOLD = {  # what `origin_of` finds of a base and a dataset on the Hub
    **{"asked": ["demo", None, None, "demo"], "original": "unsloth/Llama-3.2-1B-Instruct", "license": "llama3.2"},
    **{"license_name": "Llama 3.2", "license_link": "https://huggingface.co/unsloth/Llama-3.2-1B-Instruct", "license_from": None},
    **{"gated": None, "language": ["en", "no"], "model_type": "llama", "datasets": [], "away": []},
}  # fmt: skip
GENERAL = {
    **{"general.license": "llama3.2", "general.license.name": "Llama 3.2", "general.languages": ["en", "no"]},
    "general.license.link": "https://huggingface.co/unsloth/Llama-3.2-1B-Instruct",
    **{"general.base_model.count": 1, "general.base_model.0.organization": "Unsloth"},
    "general.base_model.0.name": "Llama 3.2 1B Instruct",
    "general.base_model.0.repo_url": "https://huggingface.co/unsloth/Llama-3.2-1B-Instruct",
    **{"general.dataset.count": 1, "general.dataset.0.name": "Questions"},
    "general.dataset.0.repo_url": "https://huggingface.co/team/questions",
}


def test_every_file_tells_its_licence_its_base_its_datasets_and_its_tags(copied):
    run = Run.open(copied)
    run.settings = run.settings.model_copy(
        update={"dataset": "team/questions", "quantizations": ["q8_0", "q4_k_m", "adapter"]}
    )
    run.record("origin", **TOLD | {"asked": ["demo", None, None, "team/questions"], "on_hub": ["team/questions"]})
    folder = run.fresh("gguf")
    gguf.gguf_files(run, run.settings.quantizations, folder)
    files = sorted(folder.glob("*.gguf"))
    assert len(files) == 3
    for path in files:
        told = official.general(path)
        assert {name: told.get(name) for name in GENERAL} == GENERAL
        assert {"gguf", "llama-cpp", "unsloth", "sft", "llama", "text-generation"} <= set(told["general.tags"])
        assert told["general.name"] == "short"
