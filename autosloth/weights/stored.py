"""A base's weights where they lie in its files, as they are or packed; all are read as 16-bit or 32-bit numbers, whole or by rows, no more of them in memory than is asked for.

MXFP4 (OCP Microscaling Formats 1.0, section 5; gpt-oss): 16 bytes hold 32 numbers of 4 bits, whose scale is an exponent of two in a byte: `<name>_blocks`, (matrices,
outputs, inputs / 32, 16), and `<name>_scales`; the parameter has inputs before outputs. FP8 (arXiv 2412.19437, section 3.3): numbers of 8 bits, and what to multiply them by,
`<name>_scale_inv`: one number for each block of, mostly, 128 x 128, or one for each matrix.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

from ..errors import ExportError, ModelError
from .files import model_shards, read_header, shard_names

TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "U8": "uint8"}
TYPES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
EIGHT_BIT = ("float8_e4m3fn", "float8_e5m2")
GROWTH = {"fp8": 2.0, "mxfp4": 3.6}  # in size, of a model that is unpacked, at most: gpt-oss 20b 3.0, 120b 3.6
NOT_WEIGHTS = ("activation_scale", "input_scale")  # of what goes through a layer, for arithmetic in 8 bits


@dataclass(frozen=True)
class Plain:
    """A tensor as it lies in a file. dtype: torch's name for its numbers; shape: rows come first, (..., width)."""

    path: str
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def paths(self) -> set[str]:
        """The files that have to be there."""
        return {self.path}

    def rows(self, wanted: Any) -> Any:
        """These rows, counted through, int64 (n,) -> (n, width); those that lie in turn are read at once. Raises ExportError when the file is cut short.

        They are not needed again, so the system is told not to keep them: it may keep what is written instead.
        """
        import numpy
        import torch

        dtype = getattr(torch, self.dtype)
        size = self.shape[-1] * dtype.itemsize
        raw = numpy.empty((len(wanted), size), numpy.uint8)
        cuts = (numpy.flatnonzero(numpy.diff(wanted) != 1) + 1).tolist()
        with open(self.path, "rb", buffering=0) as file:
            for first, last in pairwise([0, *cuts, len(wanted)]):
                start, length = self.offset + int(wanted[first]) * size, (last - first) * size
                if os.preadv(file.fileno(), [raw[first:last]], start) != length:
                    raise ExportError(f"{self.path} is cut short.", "Download the base again.")
                if hasattr(os, "posix_fadvise"):  # macOS has none
                    os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_DONTNEED)
        return torch.from_numpy(raw).view(dtype)

    def whole(self) -> Any:
        """The whole tensor, which takes memory only where it is changed."""
        import numpy
        import torch

        dtype = getattr(torch, self.dtype)
        raw = numpy.memmap(self.path, mode="c", offset=self.offset, shape=math.prod(self.shape) * dtype.itemsize)
        return torch.from_numpy(raw).view(dtype).reshape(self.shape)


@dataclass(frozen=True)
class Packed:
    """A weight that is made of two tensors, in bfloat16, for whose range no scale is too large."""

    numbers: Plain
    scales: Plain

    dtype = "bfloat16"

    @property
    def paths(self) -> set[str]:
        """The files that have to be there."""
        return {self.numbers.path, self.scales.path}

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.numbers.shape

    def __getitem__(self, span: slice) -> Any:
        """What lies between two places along the first axis."""
        import numpy

        height = math.prod(self.shape[1:-1])
        made = self.rows(numpy.arange(span.start * height, span.stop * height))
        return made.reshape(span.stop - span.start, *self.shape[1:])

    def rows(self, wanted: Any) -> Any:
        """These rows, counted through, int64 (n,) -> (n, width)."""
        raise NotImplementedError

    def whole(self) -> Any:
        """The whole weight; beside it, a million numbers or a matrix are in memory."""
        import torch

        made = torch.empty(self.shape, dtype=torch.bfloat16)
        step = max(1, (1 << 20) // math.prod(self.shape[1:]))
        for first in range(0, self.shape[0], step):
            made[first : first + step] = self[first : min(first + step, self.shape[0])]
        return made


@dataclass(frozen=True)
class MXFP4(Packed):
    """A stack of matrices in MXFP4, unpacked by transformers' own function, matrix by matrix."""

    @property
    def shape(self) -> tuple[int, ...]:
        matrices, outputs, blocks, half = self.numbers.shape
        return matrices, 2 * half * blocks, outputs

    def __getitem__(self, span: slice) -> Any:
        import numpy
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        def matrices(part: Plain) -> Any:
            height = math.prod(part.shape[1:-1])
            lines = part.rows(numpy.arange(span.start * height, span.stop * height))
            return lines.reshape(span.stop - span.start, *part.shape[1:])

        return convert_moe_packed_tensors(matrices(self.numbers), matrices(self.scales))

    def rows(self, wanted: Any) -> Any:
        import torch

        matrix, line = (torch.from_numpy(part) for part in divmod(wanted, self.shape[1]))
        counts = torch.unique_consecutive(matrix, return_counts=True)[1].tolist()
        runs = zip(matrix.split(counts), line.split(counts), strict=True)
        return torch.cat([self[int(of[0]) : int(of[0]) + 1][0, lines] for of, lines in runs])


@dataclass(frozen=True)
class FP8(Packed):
    """A matrix, or a stack of them, in FP8. scales: (blocks down, counted through, blocks across); block: (rows, columns); height: rows within which blocks are counted."""

    block: tuple[int, int]
    height: int

    def rows(self, wanted: Any) -> Any:
        import numpy
        import torch

        tall, wide = self.block
        down = wanted // self.height * math.ceil(self.height / tall) + wanted % self.height // tall
        needed, which = numpy.unique(down, return_inverse=True)
        scale = self.scales.rows(needed).float()[which].repeat_interleave(wide, 1)[:, : self.shape[-1]]
        return (self.numbers.rows(wanted).float() * scale).to(torch.bfloat16)


def packing(config: dict[str, Any]) -> dict[str, Any] | None:
    """What a config.json says of how the weights are packed; None where they are not."""
    inner = (config.get("text_config") or {}).get("quantization_config")
    return config.get("quantization_config", inner)


def without_packing(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json that says nothing of how the weights are packed.

    >>> without_packing({"text_config": {"quantization_config": {}}, "dtype": "bfloat16"})
    {'text_config': {}, 'dtype': 'bfloat16'}
    """
    inner = {"text_config": without_packing(config["text_config"])} if config.get("text_config") else {}
    return {key: inner.get(key, value) for key, value in config.items() if key != "quantization_config"}


def model_headers(folder: Path) -> dict[Path, dict[str, dict[str, Any]]]:
    """The header of each of a model's files, with weights that are packed as what they become: such an entry has the `packed` weight in it, at the place of its numbers.

    Raises ExportError when they are packed in a way that is not known here, or a part is missing.
    """
    headers = {shard: read_header(shard) for shard in model_shards(folder)}
    told = packing(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    if told is None:
        return headers
    if told.get("quant_method") not in GROWTH:
        raise ExportError(
            f"The weights in {folder} are stored as {told.get('quant_method')}, which is not unpacked here.",
            "Name a 16-bit model as `sixteen_bit_model`.",
        )
    parts = {name: part for shard, header in headers.items() for name, part in parts_in(shard, header).items()}
    return {shard: unpacked(header, parts, told) for shard, header in headers.items()}


def refuse_untold(folder: Path, model: str) -> None:
    """Raises ModelError where a model's files hold numbers of 8 bits of which config.json says nothing: transformers would take them without their scales, and say nothing either.

    Files that are not there are not looked at.
    """
    if packing(json.loads((folder / "config.json").read_text(encoding="utf-8"))) is not None:
        return
    for shard in filter(Path.is_file, (folder / name for name in shard_names(folder))):
        for name, entry in read_header(shard).items():
            if TYPES.get(entry["dtype"]) in EIGHT_BIT:
                raise ModelError(
                    f"The files of {model} hold {name} in 8 bits ({entry['dtype']}), and its config.json does not say how: it would be trained on numbers without their scales.",
                    "Choose its 16-bit original, or a form that transformers loads.",
                )


def parts_in(shard: Path, header: dict[str, dict[str, Any]]) -> dict[str, Plain]:
    """The tensors of a file where they lie in it; the data begin behind the header."""
    with open(shard, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    return {
        name: Plain(str(shard), start + entry["data_offsets"][0], TYPES.get(entry["dtype"], ""), tuple(entry["shape"]))
        for name, entry in header.items()
    }


def unpacked(header: dict[str, Any], parts: dict[str, Plain], told: dict[str, Any]) -> dict[str, Any]:
    """The header of a file with the packed weights in place of their parts, which may lie in other files. Raises ExportError."""
    made, scales = {}, {scales_of(name, part) for name, part in parts.items()}
    for name, entry in header.items():
        if scale := scales_of(name, parts[name]):
            refuse_without_scale(name, scale, parts)
            form = mxfp4 if name.endswith("_blocks") else fp8
            packed = form(name, parts[name], parts[scale], told)
            entry = {"dtype": "BF16", "shape": list(packed.shape), "data_offsets": [0, 0], "packed": packed}
            made[name.removesuffix("_blocks")] = entry
        elif name not in scales and not name.endswith(NOT_WEIGHTS):
            made[name] = entry
    return made


def scales_of(name: str, part: Plain) -> str | None:
    """What the scales of a packed tensor are called; None for one that is not packed."""
    if part.dtype in EIGHT_BIT:
        return f"{name}_scale_inv"
    return f"{name.removesuffix('blocks')}scales" if part.dtype == "uint8" and name.endswith("_blocks") else None


def refuse_without_scale(name: str, scale: str, parts: dict[str, Plain]) -> None:
    """Raises ExportError where the scales of a packed tensor are not there, or not under the name of the form that is known."""
    if scale in parts:
        return
    other = f"{name}_scale"
    if other in parts:
        raise ExportError(
            f"The base holds {name} with {other} and not {scale}, which is a form of FP8 that is not unpacked here.",
            "Name a 16-bit model as `sixteen_bit_model`.",
        )
    raise ExportError(
        f"The base holds {name} without its scales ({scale}).",
        "Download the base again, or name a 16-bit model as `sixteen_bit_model`.",
    )


def misfit(name: str, numbers: Plain, scales: Plain) -> ExportError:
    """That the scales of a weight are of another form than is known."""
    return ExportError(
        f"The scales of {name} ({scales.dtype}, {scales.shape}) do not fit its numbers ({numbers.shape}).",
        "Name a 16-bit model as `sixteen_bit_model`.",
    )


def mxfp4(name: str, numbers: Plain, scales: Plain, told: dict[str, Any]) -> MXFP4:
    """A stack of matrices in MXFP4. Raises ExportError when the scales are of another form."""
    if len(numbers.shape) != 4 or numbers.shape[-1] != 16 or (scales.dtype, scales.shape) != ("uint8", numbers.shape[:-1]):  # fmt: skip
        raise misfit(name, numbers, scales)
    return MXFP4(numbers, scales)


def fp8(name: str, numbers: Plain, scales: Plain, told: dict[str, Any]) -> FP8:
    """A weight in FP8 by blocks, or with one scale a matrix or for all. Raises ExportError when the scales are of another form."""
    block, count = told.get("weight_block_size", (128, 128)), math.prod(scales.shape)
    sized = isinstance(block, (list, tuple)) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
    if len(numbers.shape) < 2 or not (sized or block is None):
        raise misfit(name, numbers, scales)
    *stack, height, width = numbers.shape
    if block and scales.shape == (*stack, *map(math.ceil, (height / block[0], width / block[1]))):
        lines = (math.prod(scales.shape[:-1]), scales.shape[-1])
    elif count in (1, math.prod(stack)):
        height *= math.prod(stack) // count
        block, lines = (height, width), (count, 1)
    else:
        lines = None
    if lines is None or "float" not in scales.dtype:
        raise misfit(name, numbers, scales)
    return FP8(numbers, Plain(scales.path, scales.offset, scales.dtype, lines), tuple(block), height)


@contextlib.contextmanager
def whole_blocks() -> Iterator[None]:
    """Let transformers unpack FP8 where blocks stand over the edge of a weight: 5.17 takes them for smaller ones that do not, or gives up.

    The weight is filled up to whole blocks meanwhile.
    """
    from torch.nn.functional import pad
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    unpack = Fp8Dequantize._dequantize_one

    def filled_up(self: Any, numbers: Any, scales: Any, output_dtype: Any = None) -> Any:
        height, width = numbers.shape[-2:]
        tall, wide = self.hf_quantizer.quantization_config.weight_block_size or (height, width)
        over = scales.shape[-2:] == (math.ceil(height / tall), math.ceil(width / wide))
        if not over or (height % tall == 0 and width % wide == 0):
            return unpack(self, numbers, scales, output_dtype)
        whole = pad(numbers.float(), (0, -width % wide, 0, -height % tall))
        return unpack(self, whole, scales, output_dtype)[..., :height, :width].contiguous()

    with mock.patch.object(Fp8Dequantize, "_dequantize_one", filled_up):
        yield
