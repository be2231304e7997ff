"""A base in MXFP4 or FP8 is merged, exported and proven as its 16-bit original is; one in another form is refused before the training."""

import json
import shutil
from functools import partial

import pytest
from support.adapters import ALL, EXPERTS, adapter, tiny
from support.families import tiny_family
from support.official import held, naming
from support.packed import in_fp8, in_mxfp4
from support.tiny_models import tiny_adapter, tiny_model

from autosloth.check import check_original
from autosloth.errors import AutoSlothError
from autosloth.export import gguf
from autosloth.export.gguf import write_gguf
from autosloth.export.merge import merge_model
from autosloth.models import sixteen_bit_model
from autosloth.proof import rounding, tensors
from autosloth.proof.reference import reference_of
from autosloth.proof.verify import verify_gguf
from autosloth.run import Run
from autosloth.settings import SFTSettings

OSS = dict(hidden_size=64, intermediate_size=32, num_local_experts=3, num_experts_per_tok=2, head_dim=16)
OVER_THE_EDGE = dict(hidden_size=192, intermediate_size=320, head_dim=48)
BASES = {
    "MXFP4": ("GptOss", OSS, in_mxfp4, {}, EXPERTS),
    "FP8 by blocks": ("Qwen3", OVER_THE_EDGE, in_fp8, {}, dict(target_modules=ALL)),
    "FP8 with one scale each": ("Qwen3", {}, in_fp8, dict(block=None), dict(target_modules=ALL, use_dora=True)),
}


@pytest.mark.parametrize("kind", BASES)
def test_the_merged_model_is_that_of_the_16_bit_original(engine, tmp_path, kind):
    from transformers import AutoModelForCausalLM

    family, config, pack, how, lora = BASES[kind]
    base = tiny(tmp_path / "base", family, **config)
    packed, plain = pack(base, **how)
    folder, _ = adapter(tmp_path / "adapter", plain, **lora)
    for source in (packed, plain):
        (tmp_path / f"merged-{source.name}").mkdir()
        merge_model(source, folder, tmp_path / f"merged-{source.name}")
    ours, expected = tmp_path / f"merged-{packed.name}", tmp_path / "merged-plain"
    assert_same(ours, expected)
    assert json.loads((ours / "config.json").read_text()) == json.loads((expected / "config.json").read_text())
    _, found = AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]


def assert_same(ours, expected):
    """That the files of two merged models hold the same bits under the same names."""
    import torch
    from safetensors.torch import load_file

    ours, expected = (load_file(folder / "model.safetensors") for folder in (ours, expected))
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == ours[name].dtype and torch.equal(tensor, ours[name]), name


def test_scales_in_another_file_than_their_numbers_are_found(engine, tmp_path):
    from safetensors.torch import load_file, save_file

    packed, plain = in_fp8(tiny(tmp_path / "base", "Qwen3"))
    folder, _ = adapter(tmp_path / "adapter", plain, target_modules=["q_proj"])
    weights = load_file(packed / "model.safetensors")
    (packed / "model.safetensors").unlink()
    scales = {name for name in weights if name.endswith("_scale_inv")}
    places = {name: f"model-{1 + (name in scales)}.safetensors" for name in weights}
    for place in set(places.values()):
        save_file({name: weights[name] for name in weights if places[name] == place}, packed / place)
    (packed / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    for source in (packed, plain):
        (tmp_path / f"merged-{source.name}").mkdir()
        merge_model(source, folder, tmp_path / f"merged-{source.name}")
    merged = load_file(tmp_path / "merged-fp8" / "model-1.safetensors")
    expected = load_file(tmp_path / "merged-plain" / "model.safetensors")
    assert merged.keys() == expected.keys() and all(tensor.equal(expected[name]) for name, tensor in merged.items())


ROADS = {
    "MXFP4": (lambda folder: tiny_family("gpt-oss", folder), in_mxfp4, EXPERTS, ["q8_0"], 2e9),
    "FP8 by blocks": (lambda folder: tiny_model("llama", folder, "bfloat16", **OVER_THE_EDGE), in_fp8, {}, ["q8_0"], 0),
    "FP8 with one scale each": (lambda folder: tiny_model("mistral", folder, "bfloat16"), partial(in_fp8, block=None), {}, ["bf16", "adapter"], 2e9),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROADS)
def test_the_files_are_those_of_the_16_bit_original_and_are_proven(engine, tmp_path, monkeypatch, kind):
    """By every weight, or by rows of each tensor where the base is larger than that."""
    make, pack, lora, kinds, whole_up_to = ROADS[kind]
    monkeypatch.setattr(tensors, "WHOLE_UP_TO", whole_up_to)
    packed, plain = pack(make(tmp_path / "base"))
    if kind == "MXFP4":  # whose tokenizer is a small one of our own
        converter = naming(tmp_path / "converter", plain, "qwen2")
        for module in (gguf, rounding, tensors):
            monkeypatch.setattr(module, "fetch_converter", lambda: converter)
    tuned = tiny_adapter(plain, tmp_path / "adapter", **lora)
    exported = {base.name: exported_and_proven(tmp_path, base, tuned, kinds) for base in (packed, plain)}
    ours, expected = ([weights for weights, _ in held(*made)] for made in exported.values())
    assert ours == expected and len(ours) == len(kinds) and all(ours)


def exported_and_proven(folder, base, tuned, kinds):
    """The files of a base and an adapter, which have passed the proof."""
    run = Run.create(SFTSettings(model=str(base), storage=str(folder / base.name), run_name="run", quantizations=kinds))
    shutil.copytree(tuned, run.path("adapter"))
    reference_of(str(base), run.path("adapter"), run.fresh("reference"))
    write_gguf.__wrapped__(run)
    verify_gguf.__wrapped__(run)
    proof = run.facts["verify"]
    assert proof["passed"] and all(
        file["weights"]["adapter_share"] == pytest.approx(1, abs=0.02) for file in proof["files"]
    )
    return sorted(run.path("gguf").glob("*.gguf"))


def stored(folder, told, **weights):
    """A folder that is a model as far as `check` looks, whose config says that its weights are packed in this way."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"quantization_config": told} if told else {}))
    save_file(weights or {"a.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    return folder


OTHER_FORMS = ["awq", "gptq", "compressed-tensors", "bitsandbytes", "torchao", "modelopt", "fbgemm_fp8"]


@pytest.mark.parametrize("method", OTHER_FORMS)
def test_another_form_is_refused_before_the_training_where_something_is_exported(tmp_path, method):
    folder = stored(tmp_path / "base", {"quant_method": method})
    told = dict(storage=str(tmp_path), merged=True, quantizations=[])
    with pytest.raises(AutoSlothError) as error:
        sixteen_bit_model(SFTSettings(model=str(folder), **told))
    assert f"stored as {method}" in error.value.what and error.value.todo == "Name it as `sixteen_bit_model`."
    with pytest.raises(AutoSlothError) as error:
        check_original(SFTSettings(model="demo", sixteen_bit_model=str(folder), **told))
    assert f"stored as {method}" in error.value.what and "`sixteen_bit_model`" in error.value.todo
    check_original(SFTSettings(model=str(folder), **told | dict(merged=False)))


def test_a_base_without_a_scale_is_refused_before_the_training(tmp_path):
    import torch

    numbers = torch.ones(2, 2).to(torch.float8_e4m3fn)
    folder = stored(tmp_path / "base", {"quant_method": "fp8"}, **{"a.weight": numbers})
    with pytest.raises(AutoSlothError, match=r"holds a.weight without its scales \(a.weight_scale_inv\)"):
        check_original(SFTSettings(model=str(folder), storage=str(tmp_path)))


@pytest.mark.parametrize(
    "packed, original",
    [
        ("RedHatAI/Llama-3.1-8B-Instruct-FP8", "unsloth/Llama-3.1-8B-Instruct"),
        ("unsloth/Llama-3.2-1B-Instruct-FP8-Block", "unsloth/Llama-3.2-1B-Instruct"),
    ],
)
def test_the_original_of_another_form_is_named_by_unsloths_list(monkeypatch, packed, original):
    monkeypatch.setattr("autosloth.models.base.stored_as", lambda source, revision=None: "compressed-tensors")
    assert sixteen_bit_model(SFTSettings(model=packed))[0] == original


@pytest.mark.parametrize("form", ["fp8", "mxfp4"])
def test_a_base_that_is_unpacked_is_its_own_original(tmp_path, form):
    folder = stored(tmp_path / "base", {"quant_method": form})
    assert sixteen_bit_model(SFTSettings(model=str(folder))) == (str(folder), ", unpacked to 16 bits")
