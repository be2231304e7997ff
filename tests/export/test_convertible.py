"""What llama.cpp does not take is told by `check`: headers of the weights and the tokenizer are converted before anything is trained."""

import json
import shutil

import pytest
from support.commands import command_line, sets
from support.families import edit, tiny_family
from support.hub_server import HubServer
from support.official import naming

from autosloth.check import Problems, check
from autosloth.export import gguf, llama
from autosloth.settings import SFTSettings
from autosloth.weights import model_headers, shard_names


@pytest.fixture(scope="module")
def smol(engine, tmp_path_factory):
    return tiny_family("SmolLM 3", tmp_path_factory.mktemp("smol") / "model", steps=1)


@pytest.fixture(scope="module")
def named(smol, tmp_path_factory):
    """A copy of the converter that knows the small tokenizer."""
    return naming(tmp_path_factory.mktemp("converter") / "llama.cpp", smol, "llama-bpe")


@pytest.fixture
def look(tmp_path, monkeypatch, named):
    """look(model, known=True, **settings): the problems that `check` finds; known: whether llama.cpp knows the tokenizer."""
    monkeypatch.setattr(gguf, "cache_dir", lambda: tmp_path / "cache")
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def look(model, known=True, **settings):
        monkeypatch.setattr(gguf, "fetch_converter", lambda: named if known else llama.fetch_converter())
        places = {"model": str(model), "dataset": str(tmp_path / "rows.jsonl"), "storage": str(tmp_path)}
        try:
            check(SFTSettings(**places, load_in_4bit=False, **settings))
        except Problems as problems:
            return problems.problems
        return []

    return look


def test_a_tokenizer_that_llama_cpp_does_not_know(look, smol):
    (problem,) = look(smol, known=False)
    assert problem.what == "llama.cpp makes no GGUF of this model: it does not know how its tokenizer splits a text."
    assert "quantizations: []" in problem.todo
    assert look(smol, known=False, quantizations=[]) == []


def test_what_was_taken_once_is_not_converted_again(look, smol, monkeypatch):
    assert look(smol) == []
    monkeypatch.setattr(gguf, "run_apart", lambda *_, **__: pytest.fail("it is converted again"))
    assert look(smol) == []


def test_a_weight_that_the_converter_has_no_place_for(look, smol, tmp_path):
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(smol, tmp_path / "extra")
    weights = load_file(model / "model.safetensors")
    weights["value_head.weight"] = weights["model.norm.weight"][None].clone()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    (problem,) = look(model)
    assert (
        problem.what.startswith(f"llama.cpp makes no GGUF of {model}: its converter ends with ")
        and "value_head" in problem.what
    )


def test_a_model_without_a_tokenizer(look, smol, tmp_path):
    model = shutil.copytree(smol, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*", "vocab*", "merges*"))
    for settings in ({}, {"quantizations": []}):
        (problem,) = look(model, **settings)
        assert problem.what == f"{model} has no tokenizer."


def test_of_a_model_on_the_hub_headers_are_enough(smol, tmp_path):
    llama.fetch_converter()  # while the index can be reached
    with HubServer() as hub:
        hub.add_repo("model", "me/smol", smol)
        asked = sets(model="me/smol", dataset="demo", storage=tmp_path, load_in_4bit=False)
        done = command_line("check", "sft", *asked, **hub.env(tmp_path / "home"))
    assert (
        done.returncode == 1
        and "llama.cpp makes no GGUF of this model: it does not know how its tokenizer" in done.stderr
    )
    assert not list((tmp_path / "home").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("kinds", "held"),
    [(dict(use_dora=True), "DoRA"), (dict(modules_to_save=["lm_head"]), "embed_tokens"), ({}, None)],
)
def test_an_adapter_that_no_gguf_of_its_own_can_hold(look, smol, kinds, held):
    problems = look(smol, quantizations=["q8_0", "adapter"], **kinds)
    assert [problem.what for problem in problems] == (
        [f"A GGUF of the adapter alone cannot hold {held}."] if held else []
    )


def test_experts_are_not_in_a_gguf_of_the_adapter_alone(look, engine, tmp_path):
    model = tiny_family("Qwen 3 MoE", tmp_path / "model", steps=1)
    (problem,) = look(model, quantizations=["adapter"])
    assert problem.what == "A GGUF of the adapter alone cannot hold mlp.experts.gate_up_proj."


ALONE = {  # family: (what is asked for, what else its config says, what is said of it)
    "Granite 4 H": ("attention", {}, None),  # transformers gives its layers other names
    "Ministral 3": ("all-linear", {}, None),  # whose converter hands all on to another
    "Qwen 3.5 text": ("all-linear", {"mtp_num_hidden_layers": 0}, None),  # as transformers saves it
    "Falcon H1": (
        "all-linear",
        {},
        "its converter ends with TypeError: 'LoraTorchTensor' object does not support item",
    ),
    "DeepSeek V3": ("attention", {}, "its converter ends with NotImplementedError."),
    "Qwen 3 Next": ("attention", {}, "its converter ends with NotImplementedError."),
    "GPT 2": ("attention", {}, "makes another adapter for {model} than it is given (blk.0.attn_qkv.weight differs by"),
}
AT_ONCE = ("Granite 4 H", "GPT 2", "Qwen 3.5 text")


@pytest.mark.parametrize("family", [family if family in AT_ONCE else pytest.param(family, marks=pytest.mark.slow) for family in ALONE])  # fmt: skip
def test_an_adapter_alone_is_tried_before_the_training(look, engine, tmp_path, family):
    """One like it is converted and proven; what llama.cpp's converter for adapters cannot do is told there."""
    asked, config, said = ALONE[family]
    model = tiny_family(family, tmp_path / "model", steps=1)
    edit(model / "config.json", config)
    problems = look(model, quantizations=["adapter"], target_modules=asked)
    assert len(problems) == bool(said)
    for problem in problems:
        assert said.format(model=model) in problem.what
        assert problem.todo == "Take `adapter` out of `quantizations`; a GGUF of the whole model can be made."


def test_granite_as_transformers_5_names_its_layers(engine, tmp_path):
    granite = tiny_family("Granite 4 H", tmp_path / "model", steps=1)
    named = json.loads((granite / "config.json").read_text())["layer_types"]
    assert set(named) == {"mamba", "attention"}
    renamed = [{"mamba": "linear_attention", "attention": "full_attention"}[name] for name in named]
    edit(granite / "config.json", {"layer_types": renamed})
    gguf.lay_source(tmp_path / "source", granite, granite)
    assert json.loads((tmp_path / "source" / "config.json").read_text())["layer_types"] == named
    assert json.loads((granite / "config.json").read_text())["layer_types"] == renamed


def test_one_file_beside_a_stale_index_is_what_everyone_reads(base, tmp_path):
    """As transformers takes it; the converter would follow the index."""
    model = shutil.copytree(base, tmp_path / "model")
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        shutil.copyfile(model / "model.safetensors", model / name)
    index = {"weight_map": {"lm_head.weight": name, "model.norm.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert shard_names(model) == ["model.safetensors"] and [*model_headers(model)] == [model / "model.safetensors"]
    gguf.lay_source(tmp_path / "source", model, model)
    laid = {path.name for path in (tmp_path / "source").iterdir() if "model." in path.name or "model-" in path.name}
    assert laid == {"model.safetensors"}
