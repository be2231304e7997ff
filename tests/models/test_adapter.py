"""An adapter to start from is as whole as its config tells, and all that it changes is trained further and exported: else it is refused before training."""

import json
import os
import subprocess
import sys

import pytest
from support.adapters import ATTENTION, EXPERTS, adapter, tiny
from support.families import tiny_family
from support.tiny_models import tiny_adapter

from autosloth.check import Problems, check
from autosloth.errors import ModelError
from autosloth.export import fetch_converter
from autosloth.models import load_model, planned_layers
from autosloth.models.adapter import HEADLESS
from autosloth.models.targets import layer_counts
from autosloth.settings import SFTSettings

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IN_LAYER_1 = "base_model.model.model.layers.1.self_attn.q_proj.lora"


@pytest.fixture(scope="module")
def llama(engine, tmp_path_factory):
    """A tiny model, and a function that makes an adapter for it, spoiled: rewrite(weights) and config change its files."""
    base = tiny(tmp_path_factory.mktemp("llama") / "base", "Llama")

    def make(folder, rewrite=None, config=None, **lora):
        adapter(folder, base, **dict(target_modules=ATTENTION) | lora)
        spoil(folder, rewrite, config)
        return SFTSettings(model=str(base), adapter=str(folder), load_in_4bit=False)

    return make


def spoil(folder, rewrite=None, config=None):
    """Change the weights and the config of an adapter."""
    from safetensors.torch import load_file, save_file

    if rewrite:
        save_file(rewrite(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    if config:
        config(told := json.loads((folder / CONFIG).read_text()))
        (folder / CONFIG).write_text(json.dumps(told))


def refused(settings):
    """What is said of an adapter, by what `check` calls."""
    with pytest.raises(ModelError) as error:
        planned_layers(settings)
    return error.value.what


def without(part):
    return lambda weights: {key: weight for key, weight in weights.items() if part not in key}


# --- Its files.


@pytest.mark.parametrize("config", [lambda told: told.update(base_model_name_or_path=None), lambda told: told.pop("base_model_name_or_path")])  # fmt: skip
def test_an_adapter_that_names_no_base_is_refused(llama, tmp_path, config):
    assert "does not say on which base it was trained" in refused(llama(tmp_path, config=config))


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_config_that_is_none_is_refused(llama, tmp_path, text):
    settings = llama(tmp_path)
    (tmp_path / CONFIG).write_text(text)
    assert "is no JSON that describes one" in refused(settings)


def test_weights_that_are_not_there_or_not_whole_are_refused(llama, tmp_path):
    settings = llama(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    for part in (whole[: len(whole) // 2], whole[:-1], b"version https://git-lfs.github.com/spec/v1", b""):
        (tmp_path / WEIGHTS).write_bytes(part)
        assert "cannot be read" in refused(settings)
    (tmp_path / WEIGHTS).unlink()
    assert f"has no {WEIGHTS}" in refused(settings)


def test_check_tells_of_broken_files_once(base, tmp_path):
    tiny_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    settings = SFTSettings(model=str(base), dataset="demo", storage=str(tmp_path), adapter=str(tmp_path / "adapter"))
    for spoiled in (WEIGHTS, CONFIG):
        (tmp_path / "adapter" / spoiled).write_bytes(b"{")
        with pytest.raises(Problems) as error:
            check(settings)
        assert len(error.value.problems) == 1 and "adapter" in error.value.problems[0].what


# --- Its weights, and what its config tells of them.


@pytest.mark.parametrize(
    "lora, rewrite, said",
    [
        ({}, without("layers.1.self_attn.q_proj"), f"lacks 2 of the weights that its {CONFIG} tells of ({IN_LAYER_1}_A.weight)"),
        ({}, lambda weights: {}, "lacks 16 of the weights"),
        ({"use_dora": True}, without("layers.1.self_attn.q_proj.lora_magnitude"), f"lacks 1 of the weights that its {CONFIG} tells of ({IN_LAYER_1}_magnitude"),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, without("lm_head"), f"lacks 1 of the weights that its {CONFIG} tells of (base_model.model.lm_head.weight)"),
        ({}, lambda weights: {key.replace("layers.1.", "layers.7."): weight for key, weight in weights.items()}, "does not fit"),
        ({}, lambda weights: {key: weight[..., :-1].clone() for key, weight in weights.items()}, "size mismatch for base_model.model.model.layers.0.self_attn.q_proj"),
    ],
)  # fmt: skip
def test_weights_that_are_not_those_of_the_config_are_refused(llama, tmp_path, lora, rewrite, said):
    assert said in refused(llama(tmp_path, rewrite, **lora))


def test_a_rank_or_layers_other_than_those_of_the_weights_are_refused(llama, tmp_path):
    assert "size mismatch" in refused(llama(tmp_path / "rank", config=lambda told: told.update(r=8)))
    more = lambda told: told["target_modules"].append("up_proj")  # noqa: E731
    assert "lacks 4 of the weights" in refused(llama(tmp_path / "more", config=more))
    assert "does not fit" in refused(llama(tmp_path / "else", config=lambda told: told.update(target_modules=["conv"])))


@pytest.mark.parametrize("spoiled", ["missing", "empty", "not a number"])
def test_it_is_refused_when_it_is_loaded_too(engine, base, tmp_path, spoiled):
    tiny_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    part = {"missing": "layers.1.", "empty": "", "not a number": None}[spoiled]
    spoil(tmp_path / "adapter", lambda weights: {key: weight / 0 for key, weight in weights.items()} if part is None else without(part)(weights))  # fmt: skip
    settings = SFTSettings(model=str(base), adapter=str(tmp_path / "adapter"), load_in_4bit=False)
    with pytest.raises(ModelError, match="not finite" if part is None else r"lacks \d+ of the weights"):
        load_model(settings)


@pytest.mark.parametrize(
    "family, lora",
    [
        ("Llama", dict(target_modules=ATTENTION, use_dora=True, rank_pattern={"q_proj": 2})),
        ("Llama", dict(target_modules=ATTENTION, modules_to_save=["embed_tokens", "lm_head", "norm"])),
        ("Gemma2", dict(target_modules=ATTENTION, modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
        ("Gemma2", dict(target_modules=ATTENTION, modules_to_save=["input_layernorm"])),
        ("Mixtral", EXPERTS),
        ("GPT2", dict(target_modules=["c_attn", "c_proj"])),
    ],
)
def test_one_that_is_whole_passes(engine, tmp_path, family, lora):
    tied = {"tie_word_embeddings": True, "head_dim": 8} if family == "Gemma2" else {}
    base = tiny(tmp_path / "base", family, **tied)
    _, model = adapter(tmp_path / "adapter", base, **lora)
    settings = SFTSettings(model=str(base), adapter=str(tmp_path / "adapter"), load_in_4bit=False)
    assert planned_layers(settings) == layer_counts(model)


def test_experts_are_not_trained_further_with_a_dropout(engine, tmp_path):
    base = tiny(tmp_path / "base", "Mixtral")
    adapter(tmp_path / "adapter", base, **EXPERTS)
    settings = SFTSettings(model=str(base), adapter=str(tmp_path / "adapter"), load_in_4bit=False, lora_dropout=0.1)
    assert "cannot be trained with `lora_dropout`" in refused(settings)


# --- What it changes.


@pytest.mark.parametrize("table", ["lm_head", "embed_tokens"])
def test_lora_on_embeddings_or_head_is_refused(llama, tmp_path, table):
    settings = llama(tmp_path, target_modules=["q_proj", table])
    assert f"has LoRA on {table}, which is not trained further here" in refused(settings)


def test_weights_of_the_base_itself_are_refused(llama, tmp_path):
    import torch

    key = "base_model.model.model.embed_tokens.weight"
    settings = llama(tmp_path, lambda weights: weights | {key: torch.zeros(96, 32)})
    assert f"holds a weight of the base itself ({key})" in refused(settings)


def test_one_that_changes_the_vision_tower_makes_no_gguf(engine, tmp_path):
    base = tiny(tmp_path / "base", "Gemma3")
    adapter(tmp_path / "adapter", base, target_modules=["q_proj", "v_proj"])
    settings = SFTSettings(model=str(base), adapter=str(tmp_path / "adapter"), load_in_4bit=False)
    assert "also changes vision_tower, and a GGUF holds the text part alone" in refused(settings)
    counts = planned_layers(settings.model_copy(update={"quantizations": [], "merged": True}))
    assert counts["vision_tower"]["trained"] == 2
    adapter(tmp_path / "adapter", base, target_modules=r".*language_model.*\.q_proj")
    assert planned_layers(settings)["self_attn.q_proj"] == {"trained": 2, "of": 2}


def test_two_weights_in_place_of_one_need_a_place_in_the_gguf(engine, tmp_path):
    for family, fits in (("Gemma2", False), ("Qwen2", True)):
        base = tiny(tmp_path / family, family, tie_word_embeddings=True)
        for whole in (["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]):
            adapter(tmp_path / "adapter", base, target_modules=["q_proj"], modules_to_save=whole)
            settings = SFTSettings(model=str(base), adapter=str(tmp_path / "adapter"), load_in_4bit=False)
            if not fits:
                assert "makes two weights of embeddings and head" in refused(settings)
            told = planned_layers(settings.model_copy(update={} if fits else {"quantizations": []}))
            assert [name for name in ("embed_tokens", "lm_head") if told.get(name, {}).get("whole")] == whole


def test_the_architectures_without_a_place_for_a_head_are_those_of_the_converter():
    """By its own tables, in a process that imports it."""
    folder = fetch_converter()
    code = """
import gguf, conversion
for name in conversion.TEXT_MODEL_MAP:
    try:
        kind = conversion.get_model_class(name)
    except (KeyError, NotImplementedError):  # speech
        continue
    if gguf.MODEL_TENSOR.OUTPUT not in gguf.MODEL_TENSORS[kind.model_arch]:
        print(name)
"""
    environment = os.environ | {"PYTHONPATH": f"{folder}:{folder / 'gguf-py'}", "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    named = {name for name in result.stdout.split() if name.endswith("ForCausalLM") and "Assistant" not in name}
    assert named == HEADLESS


def test_embeddings_that_are_the_head_stay_so_from_adapter_to_adapter_without_a_word_of_it(engine, tmp_path, recwarn):
    base = tiny_family("Gemma 3", tmp_path / "base", steps=1)
    settings = SFTSettings(model=str(base), load_in_4bit=False, modules_to_save=["embed_tokens"])
    load_model(settings).save_pretrained(tmp_path / "adapter")
    model = load_model(settings.model_copy(update={"adapter": str(tmp_path / "adapter")}))
    model.add_adapter("ref", model.peft_config["default"])  # as preference tuning does
    for name in ("default", "ref"):
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        assert len({end.modules_to_save[name].weight.data_ptr() for end in ends}) == 1
    assert not [said for said in recwarn if "ensure_weight_tying" in str(said.message)]
