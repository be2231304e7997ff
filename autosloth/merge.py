"""The adapter into the base's weights, one tensor at a time: W + (alpha / r) B A (LoRA, arXiv 2106.09685, section 4.1)."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base import TOKENIZER_FILES, export_base
from .errors import ExportError
from .run import Run, stage

# Other ways of PEFT to change a weight; each needs a rule of its own to be merged right.
UNSUPPORTED = (
    "use_dora",
    "fan_in_fan_out",
    "alpha_pattern",
    "rank_pattern",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
)
BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass
class Adapter:
    """A LoRA adapter as saved by PEFT, ready to be merged tensor by tensor.

    pairs: weight name -> (A of shape (r, in), B of shape (out, r)), float32; scale: alpha / r, or
    alpha / sqrt(r) with rsLoRA; replaced: weights that were trained whole.
    """

    pairs: dict[str, tuple[Any, Any]]
    replaced: dict[str, Any]
    scale: float

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """Raises ExportError when the adapter is of a kind that is not merged here."""
        from safetensors.torch import load_file

        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        other = [name for name in UNSUPPORTED if config.get(name)]
        if config["peft_type"] != "LORA" or other:
            raise ExportError(
                f"The adapter in {folder} uses {', '.join(other) or config['peft_type']}, which is not merged here.",
                "Train a plain LoRA adapter.",
            )
        halves, replaced = {}, {}
        for key, tensor in load_file(folder / "adapter_model.safetensors").items():
            name = key.removeprefix("base_model.model.")
            if name.endswith((".lora_A.weight", ".lora_B.weight")):
                halves.setdefault(name[: -len(".lora_A.weight")] + ".weight", {})[name[-8]] = tensor.float()
            elif ".lora_" in name:
                raise ExportError(
                    f"The adapter in {folder} holds {key}, which is not merged here.",
                    "Train a plain LoRA adapter on linear layers.",
                )
            else:
                replaced[name] = tensor
        scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
        return cls({name: (half["A"], half["B"]) for name, half in halves.items()}, replaced, scale)

    def merged(self, name: str, weight: Any, rows: slice = slice(None)) -> Any:
        """These rows of the weight of this name with the adapter in them, float32 where they changed.

        weight: the base's tensor of this name, or only these rows of it, which are then all that is computed.
        """
        if name in self.replaced:
            return self.replaced[name][rows]
        if name not in self.pairs:
            return weight
        a, b = self.pairs[name]
        return weight.float() + self.scale * (b[rows] @ a)

    def changes(self, name: str) -> bool:
        """Whether the adapter has something to say about the weight of this name."""
        return name in self.pairs or name in self.replaced

    def refuse_left_over(self, names: set[str]) -> None:
        """Raises ExportError when the adapter changes weights that the base does not have."""
        missing = sorted((self.pairs.keys() | self.replaced.keys()) - names)
        if missing:
            raise ExportError(
                f"The adapter changes {len(missing)} weights that the base does not have, for example {missing[0]}.",
                "Name the base that it was trained on as `sixteen_bit_model`.",
            )


@stage("merge", reads=("merged", "sixteen_bit_model"), after=("train",), facts=("merge",), outputs=("merged",))
def write_merged(run: Run) -> None:
    """Write merged/: the model with the adapter in its weights, as 16-bit safetensors, when the settings ask for it."""
    shutil.rmtree(run.path("merged"), ignore_errors=True)
    if not run.settings.merged:
        return run.record("merge", path=None)
    base, adapter, started = export_base(run.settings, "merge"), Adapter.read(run.path("adapter")), time.perf_counter()
    shards = sorted(base.glob("*.safetensors"))
    if not shards:
        raise ExportError(f"{base} has no safetensors weights.", "Choose a model that has them.")
    folder = run.fresh("merged")
    names = {name for shard in shards for name in merge_shard(shard, folder / shard.name, adapter)}
    adapter.refuse_left_over(names)
    copy_surroundings(base, run.path("adapter"), folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    run.record("merge", path="merged", bytes=size, seconds=round(time.perf_counter() - started, 2))


def merge_shard(source: Path, target: Path, adapter: Adapter) -> list[str]:
    """Write one shard with the adapter merged in, one tensor in memory at a time; returns the names of its tensors.

    Format: 8 bytes of header length (little endian), a JSON header of dtype, shape and offsets, the data
    (https://huggingface.co/docs/safetensors). float32 becomes float16, so that the result is 16-bit.
    """
    import torch
    from safetensors import safe_open

    kinds = {"F32": torch.float16, "F16": torch.float16, "BF16": torch.bfloat16}
    header = read_header(source)
    layout, size = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in kinds:
            raise ExportError(
                f"{source.name} holds {name} as {entry['dtype']}, which is no 16-bit or 32-bit weight.",
                "Name a 16-bit model as `sixteen_bit_model`.",
            )
        count = 2 * math.prod(entry["shape"])
        layout[name] = {
            "dtype": "BF16" if entry["dtype"] == "BF16" else "F16",
            "shape": entry["shape"],
            "data_offsets": [size, size + count],
        }
        size += count
    text = json.dumps({"__metadata__": {"format": "pt"}, **layout}).encode()
    text += b" " * (-len(text) % 8)
    with safe_open(source, "pt") as tensors, open(target, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in layout:
            weight = adapter.merged(name, tensors.get_tensor(name)).to(kinds[header[name]["dtype"]])
            file.write(weight.contiguous().view(torch.uint8).numpy().data)
    return list(layout)


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file: name -> dtype, shape, data_offsets."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return header


def copy_surroundings(base: Path, adapter: Path, folder: Path) -> None:
    """The config and index of the base and the tokenizer of the adapter, beside merged weights."""
    for name in ("generation_config.json", "model.safetensors.index.json"):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = "bfloat16" if config.get(key) == "bfloat16" else "float16"
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for path in tokenizer_of(adapter):
        shutil.copyfile(path, folder / path.name)


def tokenizer_of(adapter: Path) -> Iterator[Path]:
    """The tokenizer's files in an adapter folder."""
    return (adapter / name for name in (*TOKENIZER_FILES, "chat_template.jinja") if (adapter / name).is_file())
