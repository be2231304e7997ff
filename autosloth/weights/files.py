"""A model's weight files: which they are, and what each holds, read from the headers alone.

A safetensors file is 8 bytes of header length (little endian), a JSON header of dtype, shape and offsets, and the data
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import ExportError

INDEX = "model.safetensors.index.json"


def shard_names(folder: Path) -> list[str]:
    """The names of a model's shards: one file, where it is there, as transformers takes it; else by the index if there is one, and they need not be there."""
    index = folder / INDEX
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return ["model.safetensors"]
    return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))


def model_shards(folder: Path) -> list[Path]:
    """The files that transformers reads a model from; others beside them (an adapter, a second form) are not its weights.

    Raises ExportError when there are none, or one is missing.
    """
    shards = [folder / name for name in shard_names(folder)]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        indexed = (folder / INDEX).is_file()
        what = f"lacks {missing[0]}" if indexed else f"has neither model.safetensors nor {INDEX}"
        raise ExportError(f"The model in {folder} {what}.", "Download it again, or choose another 16-bit model.")
    return shards


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file: name -> dtype, shape, data_offsets, in the order of the data. Raises ExportError when it is none, but the pointer of Git LFS, say."""
    with open(path, "rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
        text = file.read(length) if 8 + length <= size else b""
    if not text.startswith(b"{"):
        raise ExportError(f"{path} is not whole, or no safetensors file.", "Download it again.")
    header = json.loads(text)
    header.pop("__metadata__", None)
    return dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))
