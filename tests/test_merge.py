"""The adapter is merged right, streamed, or refused by name."""

import json
import shutil

import pytest

from autosloth.errors import ExportError
from autosloth.merge import Adapter, merge_shard, read_header


def test_merged_weights_equal_pefts_own_merge(engine, finished, base):
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    expected = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), finished / "adapter")
        .merge_and_unload()
        .state_dict()
    )
    merged = load_file(finished / "merged" / "model.safetensors")
    before = load_file(base / "model.safetensors")
    assert merged.keys() == before.keys()
    for name, weight in merged.items():
        assert torch.allclose(weight.float(), expected[name].half().float(), atol=1e-3, rtol=1e-3), name
    changed = [name for name in merged if not torch.equal(merged[name], before[name].half())]
    assert len(changed) == len(Adapter.read(finished / "adapter").pairs)


def test_the_merged_folder_opens_in_transformers_and_is_16_bit(engine, finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished / "merged")
    assert str(model.dtype) == "torch.float16"
    assert AutoTokenizer.from_pretrained(finished / "merged").chat_template
    assert {entry["dtype"] for entry in read_header(finished / "merged" / "model.safetensors").values()} == {"F16"}


def test_a_base_in_bfloat16_stays_in_bfloat16(finished, base, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    adapter = Adapter.read(finished / "adapter")
    weights = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, tmp_path / "base.safetensors")
    merge_shard(tmp_path / "base.safetensors", tmp_path / "merged.safetensors", adapter)
    for name, tensor in load_file(tmp_path / "merged.safetensors").items():
        assert torch.equal(tensor, adapter.merged(name, weights[name]).bfloat16()), name


def test_rows_of_a_weight_are_merged_as_the_whole_weight_is(finished, base):
    import torch
    from safetensors.torch import load_file

    adapter, name = Adapter.read(finished / "adapter"), "model.layers.0.self_attn.q_proj.weight"
    weight = load_file(base / "model.safetensors")[name]
    rows = slice(5, 12)
    assert torch.allclose(adapter.merged(name, weight[rows], rows), adapter.merged(name, weight)[rows], atol=1e-6)
    assert not torch.equal(adapter.merged(name, weight[rows], rows), weight[rows])


@pytest.mark.parametrize(
    "change, what",
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"peft_type": "IA3"}, "IA3"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_by_name(finished, tmp_path, change, what):
    shutil.copytree(finished / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ExportError, match=what):
        Adapter.read(tmp_path / "adapter")


def test_rslora_scales_by_the_root_of_the_rank(finished, tmp_path):
    shutil.copytree(finished / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    assert Adapter.read(tmp_path / "adapter").scale == config["lora_alpha"] / config["r"]
    path.write_text(json.dumps(config | {"use_rslora": True}))
    assert Adapter.read(tmp_path / "adapter").scale == config["lora_alpha"] / config["r"] ** 0.5


def test_a_base_that_the_adapter_was_not_trained_on_is_refused(finished):
    with pytest.raises(ExportError, match=r"28 weights that the base does not have.*sixteen_bit_model"):
        Adapter.read(finished / "adapter").refuse_left_over({"model.embed_tokens.weight"})
