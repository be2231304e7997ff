"""Every family of models goes down the whole road: trained, trained further, preferences on top, merged, exported, proven; or `check` refuses it.

docs/models.md says so; `python test_families.py` writes it anew.
"""

import importlib.util
import json
from pathlib import Path

import pytest
from support.families import FAMILIES, REFUSED, family_tokenizer, tiny_family, without_weights
from support.official import converted, held, naming, quantized

from autosloth.export import gguf, llama
from autosloth.proof import rounding
from autosloth.proof import tensors as proof_tensors
from autosloth.proof.reference import load_to_answer

WHOSE = ("general.license", "general.base_model", "general.dataset", "general.languages", "general.tags")
FAST = ("Ministral 3",)  # of a small vocabulary: a wrapper, whose converter hands on to another
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
OPTIONS = dict(
    max_steps=4, max_length=64, batch_size=2, gradient_accumulation=1, eval_rows=4, eval_answers=1, max_new_tokens=24,
    learning_rate=0.005, lora_r=4, lora_alpha=8, load_in_4bit=False, quantizations=[], publish_unverified=True,
)  # fmt: skip


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """Files of questions with answers, and of pairs of answers, about what the tiny models were taught."""
    folder = tmp_path_factory.mktemp("rows")
    asked = [(f"What does item {i} cost?", f"item {i} costs {i * 7 % 97} coins") for i in range(40)]
    answers = [{"prompt": question, "completion": answer} for question, answer in asked]
    pairs = [{"prompt": question, "chosen": answer, "rejected": "nothing"} for question, answer in asked]
    for name, lines in (("answers", answers), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def logits(folder, kind, ids, adapter=None):
    """What a model of a class in transformers, in float32, makes of token ids; adapter: put on by PEFT, as anyone would."""
    import torch
    import transformers
    from peft import PeftModel

    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter, torch_device="cpu")
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits


def trained(folder, model, rows, name, **more):
    """A run that was trained on answers, or on pairs."""
    from autosloth.data import prepare_data
    from autosloth.run import Run
    from autosloth.settings import DPOSettings, SFTSettings
    from autosloth.training import train_adapter, train_preferences

    pairs = name == "pairs"
    kind, train = (DPOSettings, train_preferences) if pairs else (SFTSettings, train_adapter)
    dataset = rows / ("pairs.jsonl" if pairs else "answers.jsonl")
    told = OPTIONS | dict(model=str(model), storage=str(folder), dataset=str(dataset), run_name=name)
    run = Run.create(kind.load(told | more))
    prepare_data(run)
    train(run)
    return run


def export(run):
    """Write merged/ and the files, and prove them: nothing is wrong with them but that a model so small may mind the rounding to 5 bits."""
    from autosloth.export import write_gguf, write_merged
    from autosloth.proof import verify_gguf

    for stage in (write_merged, write_gguf, verify_gguf):
        stage(run)
    for file in run.facts["verify"]["files"]:
        assert file["passed"] or (file["type"] != "Q8_0" and file["cause"] == "rounding"), file["failures"]
        assert file["token_mismatches"] == 0 and file["weights"]["failures"] == []
        assert file["weights"]["adapter_share"] == pytest.approx(1, abs=0.02)


def known_converter(words, model, folder):
    """llama.cpp's converter; where the model's tokenizer is a small one of our own, a copy that is told how it splits words."""
    return (
        naming(folder, model, words.removeprefix("small-")) if words.startswith("small-") else llama.fetch_converter()
    )


def reached(run):
    """The kinds of layers that were trained."""
    return {kind for kind, count in run.facts["train"]["layers"].items() if count["trained"]}


@pytest.mark.parametrize("family", [family if family in FAST else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES])  # fmt: skip
def test_a_family_is_trained_trained_further_merged_exported_and_proven(family, engine, rows, tmp_path, monkeypatch):
    model = tiny_family(family, tmp_path / "model")
    converter = known_converter(FAMILIES[family].words, model, tmp_path / "converter")
    for module in (gguf, rounding, proof_tensors):
        monkeypatch.setattr(module, "fetch_converter", lambda: converter)
    first = trained(tmp_path, model, rows, "first")
    kinds = ["q8_0", "q4_k_m"] if FAMILIES[family].gguf else []
    further = dict(adapter=str(first.folder), merged=True, quantizations=kinds)
    second = trained(tmp_path, model, rows, "second", **further)
    pairs = trained(tmp_path, model, rows, "pairs", adapter=str(second.folder))
    assert reached(first) == reached(second) == reached(pairs) == set(FAMILIES[family].layers.split())
    assert pairs.facts["train"]["first_loss"] == pytest.approx(
        0.6931, abs=1e-3
    )  # its reference is where it starts from
    export(second)
    compare_merged(family, model, second)
    if kinds:
        compare_files(second, converter, "f32" if family == "Falcon H1" else "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("family, whole", [("Mistral", ["embed_tokens", "lm_head"]), ("Gemma 2", ["embed_tokens"])])
def test_what_is_trained_whole_goes_down_the_road_too(family, whole, engine, rows, tmp_path):
    """The head of Gemma 2 is its embeddings, and stays so."""
    from safetensors.torch import load_file

    model = tiny_family(family, tmp_path / "model")
    first = trained(tmp_path, model, rows, "first", modules_to_save=whole)
    further = dict(adapter=str(first.folder), merged=True, quantizations=["q8_0"])
    second = trained(tmp_path, model, rows, "second", modules_to_save=whole, **further)
    pairs = trained(tmp_path, model, rows, "pairs", adapter=str(second.folder))
    for run in (first, second, pairs):
        assert reached(run) == {*FAMILIES[family].layers.split()}
        told = run.facts["train"]["layers"]
        assert {name for name in told if told[name].get("whole")} == {"embed_tokens", "lm_head"}
    assert pairs.facts["train"]["first_loss"] == pytest.approx(0.6931, abs=1e-3)
    kept = [load_file(run.path("adapter") / "adapter_model.safetensors") for run in (first, second, pairs)]
    for name in whole:
        key = next(key for key in kept[0] if name in key and "lora" not in key)
        assert len({weights[key].sum().item() for weights in kept}) == 3, f"{name} was trained each time"
    export(second)


def compare_merged(family, model, run):
    """merged/ answers as PEFT does with the adapter, and what is not trained is the base's, byte for byte: vision, and blocks that predict further tokens."""
    import torch

    kind, ids = FAMILIES[family].kind, list(range(5, 45))
    base, expected, merged = logits(model, kind, ids), logits(model, kind, ids, run.path("adapter")), logits(run.path("merged"), kind, ids)  # fmt: skip
    change = (expected - base).abs().mean()
    with torch.no_grad():  # as `verify FILE --against MODEL --adapter` loads it
        loaded = load_to_answer(model, run.path("adapter")).float()(input_ids=torch.tensor([ids])).logits
    assert (loaded - expected).abs().mean() < 0.1 * change
    assert change > 0.01 and (merged - expected).abs().mean() < 0.1 * change
    before, after = weights(model), weights(run.path("merged"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(part in name for name in changed for part in ("vision", "visual", "mtp.", "norm", "embed", "router"))  # fmt: skip


def weights(folder):
    """All tensors of a model's files."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def compare_files(run, converter, whole):
    """The files are what llama.cpp's converter and quantiser make of merged/: the same bits, the same metadata.

    whole: the type that the quantiser begins with; 16 bits would round the weights of Falcon H1, which the converter multiplies.
    """
    merged, (ours, other) = run.path("merged"), (run.path(file["path"]) for file in run.facts["export"]["gguf"])
    kinds = {kind: run.folder / f"official-{kind}.gguf" for kind in ("q8_0", whole, "q4_k_m")}
    converted(
        *((merged, kinds[kind], kind) for kind in ("q8_0", whole)),
        options="--no-mtp" if lost_blocks(merged) else "",
        name="second",
        converter=converter,
    )
    quantized(kinds[whole], kinds["q4_k_m"], "q4_k_m")
    found = held(ours, other, kinds["q8_0"], kinds["q4_k_m"])
    for (tensors, told), (expected, metadata) in zip(found[:2], found[2:], strict=True):
        assert {name: tensor for name, tensor in tensors.items() if tensor != expected.get(name)} == {}
        told = [[name, value] for name, value in told if not name.startswith(WHOSE)]  # which ours tells besides
        assert (tensors.keys(), told) == (expected.keys(), metadata)


def lost_blocks(folder):
    """Whether config.json tells of a family with blocks for multi-token prediction, and the files hold none: transformers saves none."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    return kind.startswith(("qwen3_5", "qwen3_next", "glm4_moe")) and not any("mtp." in name for name in weights(folder))  # fmt: skip


# ------------------------------------------------------------------------------------------------------- what is not carried, and the page
@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_be_carried_is_refused_before_anything_is_trained(family, engine, tmp_path):
    import transformers

    from autosloth.check import Problems, check
    from autosloth.settings import SFTSettings

    kind, config_kind, needs, said = REFUSED[family]
    if "timm" in family and importlib.util.find_spec("timm"):
        pytest.skip("timm is installed here")
    model = tmp_path / "model"
    family_tokenizer(FAMILIES["Mistral"], model)
    getattr(transformers, config_kind)(**needs, architectures=[kind]).save_pretrained(model)
    (model / "model.safetensors").write_bytes(b"")
    with pytest.raises(Problems) as error:
        check(SFTSettings(model=str(model), dataset="demo", storage=str(tmp_path), load_in_4bit=False))
    assert any(said in problem.what for problem in error.value.problems) and all(
        problem.todo for problem in error.value.problems
    )


HEAD = """# Which models are carried

A tiny model of each family below goes down the whole road in a test (`tests/test_families.py`, which writes this page), on a CPU, with the class that
its config.json names on the Hub: LoRA by answers, that adapter trained further, preferences on top, the merged model with the logits that PEFT gives
and every other tensor byte for byte the base's, Q8_0 and Q4_K_M files with the bits of llama.cpp's own converter and quantiser on the merged model, and the proof of both.
What a GPU makes of them is not measured but for Mistral 7B and some Llama 3 ([gpu.md](gpu.md)).

`autosloth check` tells for any model by kind how many matrices are trained of how many. Experts are trained as the stacks that transformers makes of
them. Of a model with eyes or ears the text part alone is trained, and the GGUF is the text model. Where transformers loads no block for multi-token
prediction (Qwen 3.5), it stays as it is in the merged model and in the GGUF; where the files hold none, the GGUF has none. Bases in MXFP4 (gpt-oss) and
FP8 are unpacked as they are read (`tests/export/test_packed.py`); in 4 bit on a GPU only the attention of gpt-oss can be trained for an export.

A base may be packed in MXFP4 (gpt-oss as OpenAI publishes it) or in FP8 with `weight_scale_inv` (by blocks, or one scale a matrix): merged model and
GGUF are those of the 16-bit weights that transformers unpacks, bit for bit (`tests/export/test_packed.py`). Of a base in another form (bitsandbytes,
compressed-tensors, AWQ, GPTQ, ...) the 16-bit original is used where Unsloth's list knows it; else `check` asks for it.

| family | class | LoRA trains | left as it is |
|---|---|---|---|
"""


def row(family):
    """The line of the page for a family."""
    from autosloth.models.targets import layer_counts, targets_of

    model = without_weights(family)
    counts = layer_counts(model, targets_of(model, "all-linear").names)
    parts: dict[str, list[str]] = {}
    for kind in FAMILIES[family].layers.split():
        block, _, name = kind.rpartition(".")
        parts.setdefault(block, []).append(name)
    trained = "; ".join(f"{block}: {', '.join(names)}" if block else ", ".join(names) for block, names in parts.items())
    left = [kind for kind, count in counts.items() if not count["trained"]] + ["mtp"] * bool(FAMILIES[family].ahead)
    name = family if FAMILIES[family].gguf else f"{family} (without a GGUF)"
    return f"| {name} | `{FAMILIES[family].kind}` | {trained} | {', '.join(left)} |\n"


def page():
    """The page as Markdown."""
    told = "\n## Refused by `autosloth check`, before anything is trained\n\n| model | what it says |\n|---|---|\n"
    refused = "".join(f"| {name} | ... {said} ... |\n" for name, (*_, said) in REFUSED.items())
    return HEAD + "".join(map(row, FAMILIES)) + told + refused


def test_the_page_tells_of_every_family(engine):
    assert PAGE.read_text() == page(), "run `python test_families.py` in tests/"


if __name__ == "__main__":
    from autosloth.models.engine import start_engine

    start_engine()
    PAGE.write_text(page(), encoding="utf-8")
