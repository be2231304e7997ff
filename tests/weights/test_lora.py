"""Each kind of LoRA adapter that PEFT makes is merged as PEFT merges it, or refused by name."""

import json
import subprocess
import sys

import pytest
from support.adapters import ALL, ATTENTION, EXPERTS, adapter, tiny

from autosloth.errors import ExportError, ModelError
from autosloth.models.adapter import starting_adapter
from autosloth.settings import DPOSettings
from autosloth.weights.files import model_shards
from autosloth.weights.lora import Adapter


def merged_here(folder, base):
    """Every tensor of the base with the adapter in it, in blocks of three rows, and the adapter."""
    import torch
    from safetensors.torch import load_file

    ours = Adapter.read(folder, base)
    stored = {name: tensor for shard in model_shards(base) for name, tensor in load_file(shard).items()}
    stored |= {name: stored[shared] for name, shared in ours.untied.items()}
    ours.refuse_left_over(set(stored))
    blocks = {
        name: [ours.merged(name, tensor[at : at + 3], slice(at, at + 3)) for at in range(0, len(tensor), 3)]
        for name, tensor in stored.items()
    }
    return {name: torch.cat(parts) for name, parts in blocks.items()}, ours


KINDS = {
    "plain": ("Llama", {}, dict(target_modules=ALL)),
    "rsLoRA": ("Llama", {}, dict(target_modules=ALL, use_rslora=True)),
    "ranks and alphas by pattern": (
        "Llama",
        {},
        dict(
            target_modules=ALL, rank_pattern={"layers.0.mlp.up_proj": 7, "k_proj": 2}, alpha_pattern={r"1\..*v_proj": 9}
        ),
    ),
    "some layers": ("Llama", {}, dict(target_modules=r".*\.1\..*q_proj", exclude_modules=None)),
    "DoRA": ("Llama", {}, dict(target_modules=ALL, use_dora=True, use_rslora=True)),
    "embeddings": ("Llama", {}, dict(target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "whole modules": ("Llama", {}, dict(target_modules=ATTENTION, modules_to_save=["embed_tokens", "lm_head", "norm"])),
    "trained biases": ("Qwen2", {}, dict(target_modules=ALL, bias="all")),
    "biases of trained layers": ("Qwen2", {}, dict(target_modules=ATTENTION, bias="lora_only")),
    "a bias of its own": ("Qwen2", {}, dict(target_modules=["q_proj", "v_proj"], lora_bias=True)),
    "tokens": ("Llama", {}, dict(target_modules=["q_proj"], trainable_token_indices=[1, 5, 90])),
    "tokens of tied embeddings": (
        "Qwen2",
        dict(tie_word_embeddings=True),
        dict(target_modules=["q_proj"], trainable_token_indices=[1, 5, 90]),
    ),
    "embeddings that are the head, kept one": (
        "Qwen2",
        dict(tie_word_embeddings=True),
        dict(target_modules=ATTENTION, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "Conv1D": ("GPT2", {}, dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "Conv1D and linear": ("GPT2", dict(tie_word_embeddings=False), dict(target_modules=["c_proj", "lm_head"])),
    "Mixtral's experts": ("Mixtral", dict(num_local_experts=3), EXPERTS | dict(r=2)),
    "Qwen's experts": ("Qwen3Moe", dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24), EXPERTS),
    "Gemma 3 with eyes": ("Gemma3", {}, dict(target_modules=r".*language_model.*(q_proj|up_proj)")),
    "Phi-3": ("Phi3", dict(pad_token_id=0), dict(target_modules=["qkv_proj", "gate_up_proj", "down_proj"])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_merged_as_peft_merges_it(engine, tmp_path, kind):
    import torch
    from safetensors.torch import load_file

    family, config, tuned = KINDS[kind]
    base = tiny(tmp_path / "base", family, **config)
    folder, model = adapter(tmp_path / "adapter", base, **tuned)
    ours, _ = merged_here(folder, base)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    theirs = load_file(tmp_path / "merged" / "model.safetensors")
    before = load_file(base / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=2e-6, rtol=1e-5), name
    changed = {name for name in before if not torch.equal(before[name], theirs[name])}
    assert changed == {name for name in before if not torch.equal(before[name], ours[name])} != set()


def test_dora_is_merged_by_rows_as_it_is_whole(engine, tmp_path):
    import torch
    from safetensors.torch import load_file

    base = tiny(tmp_path / "base", "Llama")
    folder, _ = adapter(tmp_path / "adapter", base, target_modules=ALL, use_dora=True)
    by_rows, ours = merged_here(folder, base)
    for name, tensor in load_file(base / "model.safetensors").items():
        assert torch.allclose(by_rows[name], ours.merged(name, tensor), atol=1e-6), name


REFUSED = {
    "IA3": {"peft_type": "IA3"},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1, 2]},
    "init_lora_weights": {"init_lora_weights": "pissa_niter_4"},
    "loftq_config": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    "layer_replication": {"layer_replication": [[0, 1], [0, 2]]},
    "kasa_config, of_a_later_peft": {"kasa_config": {"beta": 0.1}, "of_a_later_peft": 3},
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_kind_that_is_not_merged_is_refused_by_name(engine, tmp_path, what):
    base = tiny(tmp_path / "base", "Llama")
    folder, _ = adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | REFUSED[what]))
    with pytest.raises(ExportError, match=f"uses .*{what}, which is not merged here"):
        Adapter.read(folder, base)


LAYERS_REFUSED = {
    "DoRA by columns": ("GPT2", {}, dict(target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True)),
    "DoRA by columns ": ("Llama", {}, dict(target_modules=["embed_tokens"], use_dora=True)),
    "a bias for a layer that has none": ("Llama", {}, dict(target_modules=["q_proj"], lora_bias=True)),
    "a layer of the kind Conv2d": ("Gemma3", {}, dict(target_modules=r".*vision_tower.*patch_embedding")),
}


@pytest.mark.parametrize("what", LAYERS_REFUSED)
def test_a_layer_that_is_not_merged_is_refused_by_name(engine, tmp_path, what):
    family, config, tuned = LAYERS_REFUSED[what]
    base = tiny(tmp_path / "base", family, **config)
    folder, _ = adapter(tmp_path / "adapter", base, **tuned)
    with pytest.raises(ExportError, match=f"The adapter has {what.strip()} "):
        Adapter.read(folder, base)


def test_an_adapter_of_another_base_is_refused(engine, tmp_path):
    base = tiny(tmp_path / "base", "Llama")
    folder, _ = adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    wider = tiny(tmp_path / "wider", "Llama", hidden_size=64)
    with pytest.raises(ExportError, match=r"does not fit the base .*q_proj.*"):
        Adapter.read(folder, wider)
    shorter = tiny(tmp_path / "shorter", "Llama", num_hidden_layers=1)
    with pytest.raises(ExportError, match=r"does not fit the base .*layers\.1\.self_attn\.q_proj.*"):
        Adapter.read(folder, shorter)
    with pytest.raises(ExportError, match=r"2 weights that the base does not have.*"):
        Adapter.read(folder, base).refuse_left_over({"model.embed_tokens.weight"})


def test_names_that_transformers_changes_on_loading_are_found_in_either_form(engine, tmp_path):
    """Files of Gemma 3 say `language_model.model` or `model.language_model`; in transformers 5 it is the latter."""
    from safetensors.torch import load_file, save_file

    base = tiny(tmp_path / "base", "Gemma3")
    folder, _ = adapter(tmp_path / "adapter", base, target_modules=r".*language_model.*(q_proj|embed_tokens)")
    first, ours = merged_here(folder, base)
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in ours.pairs
    assert ours.untied == {"lm_head.weight": "language_model.model.embed_tokens.weight"}
    renamed = {
        name.replace("language_model.model.", "model.language_model."): tensor
        for name, tensor in load_file(base / "model.safetensors").items()
    }
    save_file(renamed, base / "model.safetensors", {"format": "pt"})
    second, ours = merged_here(folder, base)
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in ours.pairs
    for name, tensor in first.items():
        assert tensor.equal(second[name.replace("language_model.model.", "model.language_model.")]), name


def test_a_weight_that_the_base_holds_in_another_form_is_refused(engine, tmp_path):
    base = tiny(tmp_path / "base", "Mixtral", num_local_experts=3)
    folder, _ = adapter(tmp_path / "adapter", base, target_modules=["q_proj"], modules_to_save=["experts"])
    with pytest.raises(ExportError, match=r"holds in another form \(model.layers.0.*w1.weight\)"):
        Adapter.read(folder, base)


@pytest.mark.parametrize(
    "entries, what",
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"layers_pattern": "h", "trainable_token_indices": [3]}, "layers_pattern, trainable_token_indices"),
        ({"bias": "lora_only"}, "bias"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"layers_to_transform": [1]}, "layers_to_transform"),
    ],
)
def test_a_kind_that_is_not_trained_further_is_refused_before_training(tmp_path, entries, what):
    written = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "base_model_name_or_path": "x/base", "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(written | entries))
    with pytest.raises(ModelError, match=rf"is no plain LoRA \({what}\)"):
        starting_adapter(DPOSettings(model="x/base", adapter=str(tmp_path)))


# In a process where nothing has imported the compiler yet, as in the one that converts.
WATCH = """
import sys, torch
from importlib.abc import MetaPathFinder
from pathlib import Path

class Watch(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch._dynamo":
            print(torch.get_default_device())

sys.meta_path.insert(0, Watch())
from autosloth.weights.lora import without_numbers
print(type(without_numbers(Path(sys.argv[1]))).__name__)
"""


def test_torchs_compiler_is_not_imported_on_the_meta_device(tmp_path):
    # torch 2.8, which Colab's oldest runtime has, cannot: `partially initialized module 'torch._dynamo'`.
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | sizes
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = subprocess.run([sys.executable, "-c", WATCH, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["cpu", "LlamaForCausalLM"]


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_an_adapter_whose_description_cannot_be_read_is_a_named_problem(tmp_path, text):
    if text is not None:
        (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ExportError, match="is no JSON that describes one"):
        Adapter.read(tmp_path, tmp_path)
