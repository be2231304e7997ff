"""The merged model is what PEFT's own merge makes, in 16 bits, and is whole or is not there."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
from support.adapters import ALL, adapter, tiny

from autosloth.errors import ExportError
from autosloth.export.merge import merge_model
from autosloth.weights.files import read_header
from autosloth.weights.lora import Adapter


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
    assert len(changed) == len(Adapter.read(finished / "adapter", base).pairs)


def test_the_merged_folder_opens_in_transformers_and_is_16_bit(engine, finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished / "merged")
    assert str(model.dtype) == "torch.float16"
    assert AutoTokenizer.from_pretrained(finished / "merged").chat_template
    assert {entry["dtype"] for entry in read_header(finished / "merged" / "model.safetensors").values()} == {"F16"}


def test_a_sharded_base_in_bfloat16_stays_so(engine, finished, base, tmp_path):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="1MB")
    folder = tmp_path / "merged"
    folder.mkdir()
    merge_model(tmp_path / "base", finished / "adapter", folder)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert shards == sorted(path.name for path in (tmp_path / "base").glob("*.safetensors")) and len(shards) > 1
    index, old = (json.loads((at / "model.safetensors.index.json").read_text()) for at in (folder, tmp_path / "base"))
    assert index["weight_map"] == old["weight_map"]
    assert index["metadata"]["total_size"] == old["metadata"]["total_size"]
    ours = Adapter.read(finished / "adapter", base)
    for shard in shards:
        before = load_file(tmp_path / "base" / shard)
        for name, tensor in load_file(folder / shard).items():
            assert torch.equal(tensor, ours.merged(name, before[name]).bfloat16()), name
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_a_base_whose_one_file_is_named_by_its_index_opens_too(engine, finished, base, tmp_path):
    from transformers import AutoModelForCausalLM

    copy, name = shutil.copytree(base, tmp_path / "base"), "model-00001-of-00001.safetensors"
    (copy / "model.safetensors").rename(copy / name)
    index = {"weight_map": dict.fromkeys(read_header(copy / name), name)}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "merged").mkdir()
    merge_model(copy, finished / "adapter", tmp_path / "merged")
    _, found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]


TIED = {
    "LoRA on the embeddings": dict(target_modules=["q_proj", "embed_tokens"]),
    "LoRA on the head": dict(target_modules=["q_proj", "lm_head"]),
    "whole embeddings": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "whole embeddings and head": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "tokens": dict(target_modules=["q_proj"], trainable_token_indices=[3, 70]),
    "neither": dict(target_modules=ALL),
    "whole embeddings, one weight": dict(
        target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
}
ONE_WEIGHT = ("tokens", "neither", "whole embeddings, one weight")


def write_twin(base, factor):
    """Let the files hold the head too, as so many times the embeddings."""
    from safetensors.torch import load_file, save_file

    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * factor
    save_file(weights, base / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "family, kind, twin",
    [
        *(("Qwen2", kind, twin) for kind in TIED for twin in (None, 1.0)),
        ("Qwen2", "whole embeddings", 1.5),
        ("Qwen2", "tokens", 1.5),
        ("Gemma3", "LoRA on the embeddings", None),
        ("Gemma3", "neither", None),
    ],
)
def test_a_base_that_ties_its_embeddings_answers_as_trained(engine, tmp_path, kind, family, twin):
    """PEFT's merge changes both of two tied weights where one was trained, so its unmerged model is what to equal.

    twin: where the files hold the head too, times how much; transformers ties it if it is the same.
    """
    import torch
    from transformers import AutoModelForCausalLM

    base = tiny(tmp_path / "base", family, **({"tie_word_embeddings": True} if family == "Qwen2" else {}))
    if twin:
        write_twin(base, twin)
    folder, model = adapter(tmp_path / "adapter", base, **TIED[kind])
    (tmp_path / "merged").mkdir()
    merge_model(base, folder, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    ids = torch.tensor([[1, 3, 70, 12, 90]])
    with torch.no_grad():
        ours, theirs = merged(input_ids=ids).logits, model(input_ids=ids).logits
        before = AutoModelForCausalLM.from_pretrained(base).eval()(input_ids=ids).logits
    assert (ours - theirs).abs().max() < 0.02 * (theirs - before).abs().max()
    own = merged.get_output_embeddings().weight.data_ptr() != merged.get_input_embeddings().weight.data_ptr()
    assert own == (kind not in ONE_WEIGHT or twin == 1.5)


def test_weights_too_large_for_float16_become_bfloat16(engine, tmp_path, capsys):
    import torch
    from safetensors.torch import load_file, save_file

    base = tiny(tmp_path / "base", "Llama")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] = 1e5
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    folder, _ = adapter(tmp_path / "adapter", base, target_modules=ALL)
    (tmp_path / "merged").mkdir()
    merge_model(base, folder, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert "bfloat16 instead of float16, because model.norm.weight has values too large" in capsys.readouterr().out
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_adapter_that_is_not_finite_is_refused(engine, tmp_path):
    from safetensors.torch import load_file, save_file

    base = tiny(tmp_path / "base", "Llama")
    folder, _ = adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "merged").mkdir()
    with pytest.raises(ExportError, match=r"values for .*q_proj.weight \(A\) are not finite.*"):
        merge_model(base, folder, tmp_path / "merged")
    assert list((tmp_path / "merged").iterdir()) == []


def test_whole_numbers_stay_and_files_that_are_no_weights_are_left_out(engine, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    base = tiny(tmp_path / "base", "Llama")
    weights = load_file(base / "model.safetensors")
    counts = {"model.positions": torch.arange(7), "model.mask": torch.ones(3, dtype=torch.bool)}
    save_file({**weights, **counts, "model.scalar": torch.tensor(2.0)}, base / "model.safetensors", {"format": "pt"})
    save_file({"layers.0.wq": torch.ones(4)}, base / "consolidated.safetensors")
    folder, _ = adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    (tmp_path / "merged").mkdir()
    merge_model(base, folder, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged["model.positions"], torch.arange(7)) and merged["model.mask"].dtype == torch.bool
    assert merged["model.scalar"] == 2 and merged["model.scalar"].dtype == torch.float16
    assert [path.name for path in (tmp_path / "merged").glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "uint8"])
def test_a_base_of_fewer_bits_is_refused(engine, finished, base, tmp_path, kind):
    import torch
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(base, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    save_file({name: tensor.to(getattr(torch, kind)) for name, tensor in weights.items()}, copy / "model.safetensors")
    (tmp_path / "merged").mkdir()
    with pytest.raises(ExportError, match=r"no 16-bit or 32-bit weight.*"):
        merge_model(copy, finished / "adapter", tmp_path / "merged")


def test_a_base_that_lacks_a_file_is_refused(finished, base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "base")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ExportError, match=r"has neither model.safetensors nor"):
        merge_model(copy, finished / "adapter", tmp_path)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ExportError, match=r"lacks model-00001-of-00002.safetensors"):
        merge_model(copy, finished / "adapter", tmp_path)


# A process of its own, not a fork: threads of torch that another test began do not live in one, and it waits for them for ever.
DEADLY = """
import os, signal, sys
from pathlib import Path
from autosloth.export import merge

name, base, adapter, folder = sys.argv[1:]
blocks = merge.merged_blocks
merge.merged_blocks = lambda tensor, *rest: os.kill(os.getpid(), signal.SIGKILL) if tensor == name else blocks(tensor, *rest)
merge.merge_model(Path(base), Path(adapter), Path(folder))
"""


def killed_at(name, *arguments):
    """Merge in a process that kills itself when it comes to the tensor of this name; its exit code."""
    return subprocess.run([sys.executable, "-c", DEADLY, name, *map(str, arguments)], capture_output=True).returncode


def test_what_a_killed_writer_leaves_is_not_taken_for_a_model(engine, finished, base, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(base, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    halves = [dict(list(weights.items())[::2]), dict(list(weights.items())[1::2])]
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, half in zip(names, halves, strict=True):
        save_file(half, copy / name, {"format": "pt"})
    index = {"weight_map": {key: name for name, half in zip(names, halves, strict=True) for key in half}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "model.safetensors").unlink()
    (tmp_path / "merged").mkdir()
    assert killed_at(list(halves[1])[-1], copy, finished / "adapter", tmp_path / "merged") == -signal.SIGKILL
    left = sorted(path.name for path in (tmp_path / "merged").iterdir())
    assert left == [f".{names[1]}.partial", names[0]]
    assert load_file(tmp_path / "merged" / names[0]).keys() == halves[0].keys()
