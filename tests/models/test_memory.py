"""The estimate of GPU memory agrees with what the libraries make, part by part; what a GPU measures beside it is in benchmarks/gpu.py."""

import json
import os
from typing import get_args

import pytest
from support.families import FAMILIES as FAMILIES_OF_ALL
from support.families import config_of, without_weights

from autosloth.check import Problems, check
from autosloth.errors import ModelError
from autosloth.models.counts import counts_of
from autosloth.models.memory import (
    NF4_BYTES,
    STATE_BYTES,
    check_memory,
    estimate,
    known_counts,
    known_shape,
    least,
    shape_of,
    whole,
)
from autosloth.models.targets import targets_of
from autosloth.settings import DPOSettings, SFTSettings, SPINSettings

MISTRAL = dict(
    model_type="mistral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=32000, tie_word_embeddings=False,
)  # fmt: skip
FAMILIES = {
    "mistral": MISTRAL,
    "llama": {**MISTRAL, "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "head_dim": 64, "tie_word_embeddings": True},
    "qwen2": {**MISTRAL, "model_type": "qwen2", "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4},
    "qwen3": {**MISTRAL, "model_type": "qwen3", "head_dim": 128, "hidden_size": 2560},
    "gemma2": {**MISTRAL, "model_type": "gemma2", "hidden_size": 2304, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True},
}  # fmt: skip


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A function that puts an NVIDIA GPU of a name and a memory in MiB before the driver's own program, or none."""

    def plug_in(name="Tesla T4", memory=15360):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\necho '{name}, {memory}'\n" if name else "#!/bin/sh\nexit 9\n")
        (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return plug_in


@pytest.fixture
def model(tmp_path):
    """A function that makes a folder with this config.json."""

    def write(**config):
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return write


def parts(settings, config=MISTRAL, gpu_gb=15.8, rank=None):
    return {part.name: part.gb for part in estimate(settings, shape_of(config), gpu_gb, rank or settings.lora_r)}


@pytest.mark.parametrize(
    "family, layers", [*((family, "all-linear") for family in FAMILIES), ("llama", "attention"), ("llama", ["up_proj"])]
)
def test_weights_and_adapter_are_those_that_transformers_and_peft_make(engine, family, layers):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {**FAMILIES[family], "num_hidden_layers": 2}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        expected = parts(SFTSettings(load_in_4bit=False, lora_r=8, target_modules=layers), config)
        assert expected["weights"] == pytest.approx(2 * model.num_parameters() / 1e9, rel=1e-3)
        lora = LoraConfig(r=8, target_modules=targets_of(model, layers).modules)
        trained, _ = get_peft_model(model, lora).get_nb_trainable_parameters()
    assert expected["adapter"] == pytest.approx(4 * trained / 1e9)


@pytest.mark.parametrize("family", ["mistral", "llama"])
def test_embeddings_and_head_that_are_trained_whole_count_with_the_adapter(engine, family):
    """Llama's are one weight here, and stay one."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from autosloth.models.engine import trained_whole

    config = {**FAMILIES[family], "num_hidden_layers": 2}
    settings = SFTSettings(load_in_4bit=False, lora_r=8, modules_to_save=["embed_tokens", "lm_head"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        counts = counts_of(model, "all-linear")
        lora = LoraConfig(
            r=8,
            target_modules=targets_of(model, "all-linear").modules,
            **trained_whole(model, settings.modules_to_save),
        )
        peft = get_peft_model(model, lora)
    trained = {id(weight): weight.numel() for weight in peft.parameters() if weight.requires_grad}
    assert parts(settings, config)["adapter"] == pytest.approx(4 * sum(trained.values()) / 1e9)
    assert counts.adapter * 8 + whole(settings, counts.table, counts.tied) == sum(trained.values())


def test_a_weight_in_nf4_takes_the_bytes_that_bitsandbytes_stores(engine):
    import torch
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(1024, 1024)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)
    stored = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert stored / weight.numel() == pytest.approx(NF4_BYTES, rel=1e-3)


def test_mistral_in_nf4_is_as_large_as_its_public_repository_and_trains_as_many_numbers():
    expected = parts(SFTSettings())
    assert expected["weights"] == pytest.approx(4.13, abs=0.01)  # GB of unsloth/mistral-7b-bnb-4bit's safetensors
    assert expected["adapter"] == pytest.approx(41_943_040 * 4 / 1e9)  # trainable parameters at rank 16


def test_layers_that_a_repository_keeps_in_16_bit_are_counted_so():
    skipped = {**MISTRAL, "quantization_config": {"llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp"]}}
    more = parts(SFTSettings(), skipped)["weights"] - parts(SFTSettings())["weights"]
    assert more == pytest.approx(3 * 4096 * 14336 * (2 - NF4_BYTES) / 1e9)


def test_more_rows_take_more_and_what_lasts_stays():
    small, large = parts(SFTSettings(batch_size=2)), parts(SFTSettings(batch_size=8))
    assert large["activations"] > 3 * small["activations"]
    assert small["weights"] == large["weights"] and small["optimizer"] == large["optimizer"]


def test_the_logits_chunk_no_more_than_is_free():
    wordy = {**MISTRAL, "vocab_size": 262144, "hidden_size": 256, "intermediate_size": 512, "head_dim": 8}
    few = parts(SFTSettings(batch_size=1, max_length=512), wordy)
    assert few["loss"] == pytest.approx(512 * 262144 * 4 / 1e9) and "activations" not in few
    assert parts(SFTSettings(batch_size=2), wordy, gpu_gb=80)["loss"] == pytest.approx(2**30 / 1e9)
    lasting = sum(size for name, size in few.items() if name != "loss")
    assert parts(SFTSettings(batch_size=2), wordy, gpu_gb=lasting + 2)["loss"] == pytest.approx(2 / 2 / 4)


def test_preferences_need_a_second_adapter_and_self_play_room_for_answers():
    pairs = DPOSettings(profile="t4", lora_r=16)
    assert parts(pairs)["adapter"] == 2 * parts(SFTSettings())["adapter"]
    few, many = (SPINSettings(generation_batch=size) for size in (1, 512))
    assert "answers" not in parts(few) and parts(many)["answers"] == pytest.approx(512 * 1024 * 2 * 32 * 1024 * 2 / 1e9)


def test_the_optimizer_counts():
    of = {name: parts(SFTSettings(optimizer=name))["optimizer"] for name in ("adamw_torch_fused", "adamw_8bit", "sgd")}
    assert of["adamw_torch_fused"] > of["adamw_8bit"] > of["sgd"] == parts(SFTSettings())["adapter"]


@pytest.mark.parametrize("name", [name for name in STATE_BYTES if "8bit" not in name])
def test_an_optimizers_states_are_as_large_as_is_reckoned(engine, tmp_path, name):
    """For the matrices of an adapter of rank 16; what is reckoned may be more, by what a step's number takes."""
    import torch
    from transformers import Trainer, TrainingArguments

    from autosloth.training.train import available_optimizer

    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((16, 256), (512, 16))]
    optim = available_optimizer(SFTSettings(optimizer=name), gpu=False)
    kind, values = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(tmp_path, optim=optim))
    optimizer = kind(weights, **values)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    held = [
        each for state in optimizer.state.values() for each in state.values() if torch.is_tensor(each) and each.dim()
    ]
    size, numbers = sum(each.numel() * each.element_size() for each in held), sum(map(torch.numel, weights))
    assert STATE_BYTES[name] / 4 <= size / numbers <= STATE_BYTES[name]
    assert set(get_args(SFTSettings.model_fields["optimizer"].annotation)) == {*STATE_BYTES}


def test_the_check_says_what_is_expected_beside_what_there_is(gpu, model, capsys):
    gpu()
    check_memory(SFTSettings(model=model(**MISTRAL)))
    said = capsys.readouterr().out
    assert said.startswith("memory: about ") and " of 16.1 GB VRAM expected" in said and "weights 4.1" in said
    assert "halve" not in said


def test_a_batch_that_may_be_too_large_is_told_and_not_refused(gpu, model, capsys):
    gpu()
    check_memory(SFTSettings(model=model(**MISTRAL), batch_size=64))
    assert "halve `batch_size` and double `gradient_accumulation`" in capsys.readouterr().out


def test_answers_that_may_be_too_many_at_once_are_told(gpu, model, capsys):
    gpu()
    check_memory(SPINSettings(model=model(**MISTRAL), generation_batch=256))
    assert "lower `generation_batch`" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "todo"),
    [
        ({"load_in_4bit": False, "max_length": 512}, "Set `load_in_4bit: true`, or choose a smaller model."),
        ({"max_length": 131072}, "Lower `max_length`."),
    ],
    ids=["the weights", "one row"],
)
def test_what_does_not_even_fit_row_by_row_is_refused(gpu, model, settings, todo):
    gpu(memory=11000)
    with pytest.raises(ModelError) as problem:
        check_memory(SFTSettings(model=model(**MISTRAL), **settings))
    assert "even with `batch_size: 1`, and Tesla T4 has 12." in problem.value.what and problem.value.todo == todo


def test_the_refusal_is_one_of_the_problems_of_the_check(gpu, model, tmp_path):
    gpu()
    settings = SFTSettings(model=model(**MISTRAL), max_length=131072, storage=str(tmp_path), dataset="demo")
    with pytest.raises(Problems, match="needs about"):
        check(settings)


def test_nothing_is_told_without_a_gpu_or_of_a_model_that_transformers_does_not_know(gpu, model, capsys, engine):
    gpu(name=None)
    check_memory(SFTSettings(model=model(**MISTRAL)))
    gpu()
    strange = SFTSettings(model=model(**{**MISTRAL, "model_type": "strange"}))
    check_memory(strange)
    assert known_shape(strange) is known_counts(strange) is None and capsys.readouterr().out == ""


@pytest.mark.parametrize("family", FAMILIES_OF_ALL)
def test_the_numbers_of_any_family_and_of_its_adapter_are_those_that_transformers_and_peft_make(family, engine):
    import torch
    from peft import LoraConfig, get_peft_model

    model = without_weights(family)
    counts, targets = counts_of(model, "all-linear"), targets_of(model, "all-linear")
    assert counts.narrow + counts.wide == model.num_parameters()
    lora = LoraConfig(r=8, target_modules=targets.modules, target_parameters=targets.parameters)
    with torch.device("meta"):
        assert get_peft_model(model, lora).get_nb_trainable_parameters()[0] == 8 * counts.adapter


def test_the_least_that_a_dense_model_takes_is_less_than_the_estimate_and_its_weights_and_adapter_are_the_same(engine):
    """Of a family whose estimate was measured, so that what is counted can be held against it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MISTRAL))
    for settings in (SFTSettings(), SFTSettings(load_in_4bit=False), DPOSettings(profile="t4", target_modules="attention")):  # fmt: skip
        counts = counts_of(model, settings.target_modules)
        sure, expected = {part.name: part.gb for part in least(settings, counts, settings.lora_r)}, parts(settings)
        assert sure["weights"] == pytest.approx(expected["weights"], rel=1e-3)
        assert (sure["adapter"], sure["optimizer"]) == (expected["adapter"], expected["optimizer"])
        assert 0 < sure["activations"] < expected.get("activations", expected.get("loss"))


MIXTRAL = {**MISTRAL, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "architectures": ["MixtralForCausalLM"]}  # fmt: skip
QWEN3_30B = dict(
    model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
    num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
    vocab_size=151936, tie_word_embeddings=False,
)  # fmt: skip


@pytest.mark.parametrize(
    "config, told", [(MIXTRAL, "12.9 of 46.7"), (QWEN3_30B, "3.4 of 30.5")], ids=["8x7B", "30B-A3B"]
)
def test_of_a_mixture_of_experts_all_weights_are_held_and_the_active_ones_told(
    gpu, model, capsys, engine, config, told
):
    """As many as the cards of Mixtral-8x7B and Qwen3-30B-A3B say, which calls 3.35 billion 3.3."""
    gpu(name="NVIDIA A100", memory=40960)
    check_memory(SFTSettings(model=model(**config), batch_size=1, max_length=512))
    said = capsys.readouterr().out
    assert said.startswith("memory: at least ") and " of 42.9 GB VRAM expected" in said
    assert f"memory: {told} billion weights work on each token, and all are held\n" in said
    gpu()
    with pytest.raises(
        ModelError, match=r"needs at least .* even with `batch_size: 1`, and Tesla T4 has 16\."
    ) as problem:
        check_memory(SFTSettings(model=model(**config), batch_size=1, max_length=512))
    assert problem.value.todo == "Choose a smaller model."


def test_more_experts_at_once_take_more_activations_and_no_more_weights(engine):
    few, many = (counts_of(without_weights("Mixtral", num_experts_per_tok=number), "all-linear") for number in (1, 4))
    assert (few.narrow, few.wide, few.adapter) == (many.narrow, many.wide, many.adapter)
    assert few.block < many.block and few.active < many.active == many.narrow + many.wide


def test_nothing_is_told_of_a_base_that_is_packed_otherwise_than_by_bitsandbytes(gpu, model, capsys):
    gpu()
    check_memory(SFTSettings(model=model(**MIXTRAL, quantization_config={"quant_method": "mxfp4"})))
    assert capsys.readouterr().out == ""


def test_a_wrapper_holds_its_vision_tower_in_16_bit(gpu, model, engine):
    seen, text = config_of("Gemma 3").to_dict(), config_of("Gemma 3").text_config.to_dict()
    gpu()
    settings = SFTSettings(model=model(**seen | {"architectures": ["Gemma3ForConditionalGeneration"]}))
    whole, alone = known_shape(settings), shape_of(text)
    made = without_weights("Gemma 3")
    assert whole.beside == made.num_parameters() - alone.numbers() > made.model.vision_tower.num_parameters()
    assert whole._replace(beside=0) == alone
    more = estimate(settings, whole, 16, 1)[0].gb - estimate(settings, alone, 16, 1)[0].gb
    assert more == pytest.approx(2 * whole.beside / 1e9)
