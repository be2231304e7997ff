"""For `merge.py` and `export.py`: a model of random numbers and an adapter for it, made on the disk; what the page cache and a process hold."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RANK = 16
SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "0.8B": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 28, "num_attention_heads": 16},
    "7.6B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
}  # the last is that of Qwen2.5-7B; all have Qwen 2's vocabulary
MORE = {"num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768, "tie_word_embeddings": False}
SHARD = 40  # tensors in a file
POOL = 1 << 27  # random numbers, which fill every tensor over and over


def make_model(base: Path, adapter: Path, size: str) -> None:
    """Write a Qwen 2 in bfloat16, and a LoRA adapter of rank RANK on all its linear layers, random in both halves."""
    import torch
    import transformers

    config = transformers.Qwen2Config(**SHAPES[size], **MORE, architectures=["Qwen2ForCausalLM"], dtype="bfloat16")
    config.save_pretrained(base)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in transformers.Qwen2ForCausalLM(config).state_dict().items()}
    largest = max(shape.numel() for shape in shapes.values())
    numbers = torch.randn(min(POOL, largest), generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    names, index = list(shapes), {}
    for number, first in enumerate(range(0, len(names), SHARD)):
        shard = {name: shapes[name] for name in names[first : first + SHARD]}
        write_shard(base / f"model-{number:05}.safetensors", shard, numbers)
        index |= dict.fromkeys(shard, f"model-{number:05}.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    write_adapter(adapter, base, {name: shape for name, shape in shapes.items() if "_proj.weight" in name})


def write_shard(path: Path, shapes: dict[str, Any], numbers: Any) -> None:
    """A safetensors file written as it is made: header, then each tensor's bytes."""
    import torch

    layout, size = {}, 0
    for name, shape in shapes.items():
        layout[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [size, size + 2 * shape.numel()]}
        size += 2 * shape.numel()
    header = json.dumps(layout).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for shape in shapes.values():
            left = shape.numel()
            while left:
                part = numbers[: min(left, len(numbers))]
                file.write(part.view(torch.uint8).numpy().data)
                left -= len(part)
        os.fsync(file.fileno())


def write_adapter(folder: Path, base: Path, shapes: dict[str, Any]) -> None:
    """A LoRA adapter for these weights, in float32, as PEFT saves it."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    halves, generator = {}, torch.Generator().manual_seed(1)
    for name, (rows, width) in shapes.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        halves[f"{key}.lora_A.weight"] = torch.randn(RANK, width, generator=generator) / width**0.5
        halves[f"{key}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.01
    targets = sorted({name.split(".")[-2] for name in shapes})
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, task_type="CAUSAL_LM", base_model_name_or_path=str(base))  # fmt: skip
    lora.save_pretrained(folder)
    save_file(halves, folder / "adapter_model.safetensors", {"format": "pt"})


def forget(folder: Path) -> None:
    """Drop a model's files from the page cache."""
    os.sync()
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def anonymous(process: int) -> int:
    """Bytes of memory that no file backs, of this process or a child of it, whichever has more."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        own = next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return max([own, *(anonymous(int(child)) for child in children)])
