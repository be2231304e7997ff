"""The merged model as 16-bit safetensors, written shard by shard: no more than a few rows of one tensor are in memory."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ExportError
from ..models import TOKENIZER_FILES, export_base
from ..output import say
from ..run import HALF_WRITTEN, Run, stage, write_json, write_text
from ..weights import INDEX, Adapter, Shards, model_headers, read_header, without_packing

BLOCK = 1 << 20  # weights at a time: 4 MB in float32, which the allocator gives again and again without new pages
FLOATS = ("F64", "F32", "F16", "BF16")
TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16"}


class OutOfRange(Exception):
    """A merged weight is too large for float16, which ends at 65504."""


@stage(
    "merge",
    reads=("merged", "sixteen_bit_model"),
    after=("train",),
    facts=("merge",),
    outputs=("merged",),
    replaces=True,
)
def write_merged(run: Run) -> None:
    """Write merged/: the model with the adapter in its weights, as 16-bit safetensors, when the settings ask for it."""
    if not run.settings.merged:
        shutil.rmtree(run.path("merged"), ignore_errors=True)
        return run.record("merge", path=None)
    started = time.perf_counter()
    with export_base(run.settings, "merge", 1, base_of(run)) as base, run.replaced("merged") as folder:
        merge_model(base, run.path("adapter"), folder)
    size = sum(path.stat().st_size for path in run.path("merged").iterdir())
    run.record("merge", path="merged", bytes=size, seconds=round(time.perf_counter() - started, 2))


def base_of(run: Run) -> dict[str, str]:
    """What tells the base that was trained from others."""
    return run.facts.get("train", {}).get("base", {})


def merge_model(base: Path, adapter_folder: Path, folder: Path) -> None:
    """Write the model in `base` with the adapter merged in, and the adapter's tokenizer, into an empty folder.

    config.json comes last, so what a killed process leaves is not taken for a model. Raises ExportError.
    """
    adapter = Adapter.read(adapter_folder, base)
    headers = model_headers(base)
    names = {name for header in headers.values() for name in header}
    adapter.refuse_left_over(names | adapter.untied.keys())
    dtype = sixteen_bit_type(headers)
    try:
        write_shards(headers, adapter, folder, dtype)
    except OutOfRange as error:
        dtype = "BF16"
        say(f"merge: bfloat16 instead of float16, because {error} has values too large for it")
        write_shards(headers, adapter, folder, dtype)
    for path in (base / "generation_config.json", *tokenizer_of(adapter_folder)):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    config = without_packing(json.loads((base / "config.json").read_text(encoding="utf-8")))
    config = merged_config(config, TORCH_NAMES[dtype], untied=bool(adapter.untied))
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def refuse_unreadable(model: str) -> None:
    """Raises ExportError when a model's folder holds weights in a form that is not read here; of one on the Hub nothing is known."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        sixteen_bit_type(model_headers(folder))


def sixteen_bit_type(headers: dict[Path, dict[str, dict[str, Any]]]) -> str:
    """bfloat16 for a model that has any, else float16. Raises ExportError for weights of fewer bits."""
    kinds = {entry["dtype"]: name for header in headers.values() for name, entry in header.items()}
    small = [kind for kind in kinds if kind.startswith(("F8", "F4", "F6", "I8", "U8"))]
    if small or not kinds.keys() & set(FLOATS):
        kind = (small or list(kinds))[0]
        raise ExportError(
            f"The base holds {kinds[kind]} as {kind}, which is no 16-bit or 32-bit weight.",
            "Name a 16-bit model as `sixteen_bit_model`.",
        )
    return "BF16" if "BF16" in kinds else "F16"


def write_shards(headers: dict[Path, dict[str, Any]], adapter: Adapter, folder: Path, dtype: str) -> None:
    """Write every shard, and the index that such names need. Raises OutOfRange."""
    stored = {name for header in headers.values() for name in header}
    missing = {name: shared for name, shared in adapter.untied.items() if name not in stored}
    places, shards = {}, Shards(next(iter(headers)).parent)
    for shard, header in headers.items():
        sources = {name: name for name in header}
        sources |= {name: shared for name, shared in missing.items() if shared in header}
        packed = [entry["packed"] for entry in header.values() if "packed" in entry]
        for path in {str(shard)}.union(*(weight.paths for weight in packed)):
            shards.need(path)
        merge_shard(shard, header, folder / shard.name, adapter, dtype, sources)
        shards.drop(shard)
        places |= dict.fromkeys(sources, shard.name)
    if set(places.values()) != {"model.safetensors"}:
        total = sum(end_of_data(read_header(folder / shard.name)) for shard in headers)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def merge_shard(
    source: Path, header: dict[str, Any], target: Path, adapter: Adapter, dtype: str, sources: dict[str, str]
) -> None:
    """Write one shard with the adapter merged in; it gets its name when it is whole.

    header: as `model_headers` tells it; sources: name of a tensor to write -> name of the tensor in it that it is made of; dtype: of every weight,
    while whole numbers stay as they are. Raises OutOfRange.
    """
    import torch
    from safetensors import safe_open

    layout = lay_out(header, dtype, sources)
    text = json.dumps({"__metadata__": {"format": "pt"}, **layout}).encode()
    text += b" " * (-len(text) % 8)
    partial = target.with_name(f".{target.name}{HALF_WRITTEN}")
    try:
        with safe_open(source, "pt") as tensors, open(partial, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, entry in layout.items():
                tensor = header[sources[name]].get("packed") or tensors.get_slice(sources[name])
                for block in merged_blocks(name, tensor, entry["shape"], adapter):
                    if entry["dtype"] == dtype:
                        block = narrowed(name, block, getattr(torch, TORCH_NAMES[dtype]))
                    file.write(block.contiguous().flatten().view(torch.uint8).numpy().data)
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def lay_out(header: dict[str, dict[str, Any]], dtype: str, sources: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The header of a merged shard: weights in two bytes each, one tensor after the other."""
    layout, start = {}, 0
    for name, source in sources.items():
        kind, shape, (first, last) = (header[source][key] for key in ("dtype", "shape", "data_offsets"))
        end = start + (2 * math.prod(shape) if kind in FLOATS else last - first)
        layout[name] = {"dtype": dtype if kind in FLOATS else kind, "shape": shape, "data_offsets": [start, end]}
        start = end
    return layout


def end_of_data(header: dict[str, dict[str, Any]]) -> int:
    """The bytes of a shard's tensors."""
    return max((entry["data_offsets"][1] for entry in header.values()), default=0)


def merged_blocks(name: str, tensor: Any, shape: list[int], adapter: Adapter) -> Iterator[Any]:
    """The merged tensor, at most BLOCK weights at a time (or one row, if that is more). tensor: gives rows by a slice."""
    if not shape:
        yield tensor[...]
        return
    step = max(1, BLOCK // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        yield adapter.merged(name, tensor[rows], rows)


def narrowed(name: str, block: Any, dtype: Any) -> Any:
    """A block in 16 bits. Raises OutOfRange where float16 is too small for it."""
    import torch

    if block.dtype == dtype or not block.numel():
        return block
    if dtype == torch.float16:
        low, high = block.aminmax()
        if max(-low, high) > torch.finfo(dtype).max:
            raise OutOfRange(name)
    return block.to(dtype)


def merged_config(config: dict[str, Any], dtype: str, untied: bool) -> dict[str, Any]:
    """A config.json that tells of the merged weights: their type, and whether some are no longer shared."""
    changed = retyped(config if "dtype" in config else {**config, "torch_dtype": dtype}, dtype)
    if untied:
        for part in (changed, changed.get("text_config", {})):
            part["tie_word_embeddings"] = False
    return changed


def retyped(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json, and those of the model's parts within it, with another type of weights."""
    return {
        key: dtype
        if key in ("dtype", "torch_dtype")
        else retyped(value, dtype)
        if isinstance(value, dict) and key.endswith("_config")
        else value
        for key, value in config.items()
    }


def tokenizer_of(adapter: Path) -> Iterator[Path]:
    """The tokenizer's files in an adapter folder."""
    return (adapter / name for name in (*TOKENIZER_FILES, "chat_template.jinja") if (adapter / name).is_file())
