"""The weights of a GGUF, block by block: rows are read from the base, merged with the adapter, quantized by llama.cpp's own C code.

A block is about a hundred rows, so memory stays at a few MB a thread, whatever the size of a tensor; a block is
read and merged once for all the files that are made. Reading, arithmetic, quantiser and writing leave Python's lock.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from ..errors import ExportError
from ..weights import Adapter, Packed, Plain, Shards

BLOCK = 1 << 18  # weights: 1 MB in float32, which the second-level cache holds
F16, F16_MOST = 1, 65504.0  # ggml's number of the type, and the largest number in it


@dataclass(eq=False)
class Weight:
    """A weight of the base where it lies in its files, and the adapter that changes it.

    name: as the adapter calls it. What changes is rounded to the base's dtype, as when the merged model is saved before
    it is converted, but for what float16 has no number for.
    """

    name: str
    stored: Plain | Packed
    adapter: Adapter
    shards: Shards

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows come first, (..., width)."""
        return self.stored.shape

    @property
    def has_rows(self) -> bool:
        """Whether it can be made row by row: a matrix, or a stack of them that the adapter leaves alone or changes one by one."""
        single = not self.adapter.changes(self.name) or (len(self.shape) == 3 and self.adapter.is_stack(self.name))
        matrix = len(self.shape) == 2 or (len(self.shape) > 2 and single)
        return matrix and self.stored.dtype in ("float32", "float16", "bfloat16")

    def rows(self, wanted: Any) -> Any:
        """These rows, int64 (n,) -> float32 (n, width), merged. Raises ExportError when the file is cut short."""
        import torch

        self.need()
        weight = self.stored.rows(wanted)
        if not self.adapter.changes(self.name):
            return weight.float()
        if len(self.shape) == 3:
            return rounded(self.merged_in_stack(weight, torch.from_numpy(wanted)), weight.dtype).float()
        first, last = int(wanted[0]), int(wanted[-1]) + 1
        in_turn = last - first == len(wanted) and bool((wanted[1:] > wanted[:-1]).all())
        rows = slice(first, last) if in_turn else torch.from_numpy(wanted)
        return rounded(self.adapter.merged(self.name, weight, rows=rows), weight.dtype).float()

    def merged_in_stack(self, weight: Any, wanted: Any) -> Any:
        """Rows of a stack of matrices, counted through, merged matrix by matrix."""
        import torch

        height = self.shape[1]
        counts = torch.unique_consecutive(wanted // height, return_counts=True)[1].tolist()
        parts = zip(weight.split(counts), wanted.split(counts), strict=True)
        return torch.cat([
            self.adapter.merged_in_stack(self.name, rows, int(numbers[0]) // height, numbers % height)
            for rows, numbers in parts
        ])  # fmt: skip

    def need(self) -> None:
        """Come back when its files can be read."""
        for path in self.stored.paths:
            self.shards.need(path)

    def whole(self) -> Any:
        """The whole weight in the base's dtype, merged: for what is small, and for what is no choice of rows."""
        self.need()
        weight = self.stored.whole()
        return (
            rounded(self.adapter.merged(self.name, weight), weight.dtype) if self.adapter.changes(self.name) else weight
        )


def rounded(merged: Any, dtype: Any) -> Any:
    """Merged weights in the base's dtype; as they are where they are too large for it."""
    import torch

    return merged if dtype == torch.float16 and float(merged.abs().max()) > F16_MOST else merged.to(dtype)


class Source(Protocol):
    """Where the rows of a tensor come from; shape: (rows, width)."""

    shape: tuple[int, int]

    def rows(self, first: int, last: int) -> Any:
        """Rows first to last, float32 (last - first, width), a NumPy array."""


@dataclass
class Selection:
    """Rows of weights: number i of the tensor is number wanted[i] of the weights, which are counted through.

    starts: the number of each weight's first row.
    """

    weights: list[Weight]
    starts: Any
    wanted: Any

    def __post_init__(self) -> None:
        self.shape = (len(self.wanted), self.weights[0].shape[-1])

    def rows(self, first: int, last: int) -> Any:
        """Raises ExportError when a file of the base is cut short."""
        import numpy

        wanted = self.wanted[first:last]
        owner = numpy.searchsorted(self.starts, wanted, side="right") - 1
        cuts = (numpy.flatnonzero(numpy.diff(owner)) + 1).tolist()
        parts = [
            self.weights[owner[a]].rows(wanted[a:b] - self.starts[owner[a]]).numpy()
            for a, b in pairwise([0, *cuts, len(wanted)])
        ]
        return parts[0] if len(parts) == 1 else numpy.concatenate(parts)


@dataclass
class Whole:
    """A tensor that was evaluated as a whole, an array of shape (..., width)."""

    array: Any

    def __post_init__(self) -> None:
        self.array = self.array.reshape(-1, self.array.shape[-1])
        self.shape = self.array.shape

    def rows(self, first: int, last: int) -> Any:
        return self.array[first:last].astype("float32", order="C", copy=False)


@dataclass
class Place:
    """Where a tensor goes: an open file, its type there (ggml's number), its first byte."""

    descriptor: int
    kind: int
    offset: int


class Filler:
    """Fills files with tensors, a block a thread, and hands to the disk what is written while more is made."""

    def __init__(self, descriptors: Iterable[int]):
        self.descriptors = list(descriptors)
        self.threads = os.cpu_count() or 1
        self.pool, self.disk = ThreadPoolExecutor(self.threads), ThreadPoolExecutor(1)
        self.waiting: deque[Future] = deque()
        self.flushed: Future | None = None

    def __enter__(self) -> Filler:
        return self

    def wait(self) -> None:
        """Come back when all that was added is written. Raises what a block raised."""
        while self.waiting:
            self.waiting.popleft().result()

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self.pool.shutdown(cancel_futures=True)
            self.disk.shutdown()

    def add(self, source: Source, places: list[Place]) -> None:
        """Pack a tensor into each of these places. Raises what an earlier block raised."""
        rows, width = source.shape
        step = max(1, BLOCK // width)
        for first in range(0, rows, step):
            while len(self.waiting) >= 3 * self.threads:
                self.waiting.popleft().result()
            self.waiting.append(self.pool.submit(write_block, source, first, min(first + step, rows), places))
        if self.flushed is None or self.flushed.done():
            self.flushed = self.disk.submit(lambda: [os.fsync(descriptor) for descriptor in self.descriptors])


def write_block(source: Source, first: int, last: int, places: list[Place]) -> None:
    """Make rows first to last of a tensor and write them to each place, packed."""
    block = source.rows(first, last)
    for place in places:
        packed = pack(block, place.kind)
        write_all(place.descriptor, packed, place.offset + first * packed.shape[1])


def write_all(descriptor: int, data: Any, offset: int) -> None:
    """Write a contiguous array; a disk that fills up writes a part before it refuses."""
    left = memoryview(data).cast("B")
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written


def pack(rows: Any, kind: int) -> Any:
    """float32 (n, width) -> uint8 (n, bytes of a row) of a ggml type, by llama.cpp's reference quantiser. Raises ExportError where float16 has no number for one of them: it would become infinite."""
    import numpy

    if kind == F16 and (largest := max(float(rows.max()), -float(rows.min()))) > F16_MOST:
        raise ExportError(
            f"The merged weights are too large for the type F16: one has a size of {largest:.6g}, and float16 ends at 65504.",
            "Take `bf16` or `q8_0` in place of `f16` in `quantizations`.",
        )
    library, (count, width) = ggml(), rows.shape
    packed = numpy.empty((count, library.ggml_row_size(kind, width)), numpy.uint8)
    written = library.ggml_quantize_chunk(kind, rows.ctypes.data, packed.ctypes.data, 0, count, width, None)
    if written != packed.nbytes:
        raise ExportError(f"llama.cpp packed {written} bytes of {packed.nbytes}.", "Please report this.")
    return packed


def ggml() -> Any:
    """llama.cpp's tensor library as llama-cpp-python brings it."""
    from llama_cpp._ggml import libggml

    if libggml.ggml_quantize_chunk.restype is not ctypes.c_size_t:
        size, pointer, number = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int64
        libggml.ggml_row_size.restype, libggml.ggml_row_size.argtypes = size, [ctypes.c_int, number]
        libggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
        libggml.ggml_quantize_chunk.restype = size
    return libggml
