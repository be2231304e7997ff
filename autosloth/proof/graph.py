"""How llama.cpp's converter makes a tensor from weights: its graph of lazy tensors, which is evaluated again on other weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..weights import Adapter, Packed, Shards

CHUNK = 1 << 22  # values that are compared at a time


@dataclass(eq=False)
class Weight:
    """A weight of the base, by the adapter's name for it; the leaf of a graph. place: the converter's note where it lies in which file, or the `Packed` that it is made of."""

    name: str
    read: Callable[[], Any]
    shape: tuple[int, ...]
    place: Any
    adapter: Adapter
    shards: Shards

    @property
    def paths(self) -> set[str]:
        """The files that hold it."""
        return self.place.paths if isinstance(self.place, Packed) else {str(self.place.data_range.filename)}

    def need(self) -> None:
        """Come back when its files can be read."""
        for path in self.paths:
            self.shards.need(path)

    def base(self) -> Any:
        """The base's own tensor, unpacked where it is packed, float32 if it holds fractions."""
        self.need()
        lazy = self.read()
        stored = type(lazy).to_eager(lazy)
        return stored.float() if stored.dtype.is_floating_point else stored

    def merged(self) -> Any:
        """The tensor with the adapter in it."""
        return self.adapter.merged(self.name, self.base())

    def row(self, number: int) -> tuple[Any, Any]:
        """One row, (1, columns) in float32, of the base and with the adapter in it; nothing else is read."""
        self.need()
        base = self.stored_row(number)
        if len(self.shape) == 3 and self.adapter.is_stack(self.name):
            matrix, number = divmod(number, self.shape[1])
            merged = self.adapter.merged_in_stack(self.name, base, matrix, slice(number, number + 1))
        else:
            merged = self.adapter.merged(self.name, base, slice(number, number + 1))
        return base.float(), merged.float()

    def stored_row(self, number: int) -> Any:
        """One row of the base, (1, columns)."""
        import numpy
        import torch

        if isinstance(self.place, Packed):
            return self.place.rows(numpy.array([number]))
        place, dtype = self.place.data_range, self.read().dtype
        size = self.shape[-1] * dtype.itemsize
        line = numpy.fromfile(place.filename, numpy.uint8, size, offset=place.offset + number * size)
        return torch.from_numpy(line).view(dtype)[None]


class Graph:
    """How the converter makes one tensor out of weights; it can be evaluated more than once, on other weights."""

    def __init__(self, lazy: Any):
        self.lazy, self.weights = lazy, []
        self.find(lazy)
        self.changed = any(weight.adapter.changes(weight.name) for weight in self.weights)

    def find(self, node: Any) -> None:
        """Note the weights at the leaves."""
        if isinstance(node, Weight):
            self.weights += [node] if node not in self.weights else []
        elif isinstance(node, (list, tuple)):
            for part in node:
                self.find(part)
        elif hasattr(node, "_args"):
            self.find(node._args)

    def evaluate(self, leaf: Callable[[Weight], Any]) -> Any:
        """float32, rows of the tensor's last axis: the graph on what `leaf` gives for each weight."""
        import numpy

        def value(node: Any) -> Any:
            if isinstance(node, (list, tuple)):
                return type(node)(map(value, node))
            if not hasattr(node, "_args"):
                return node
            if node._args and isinstance(node._args[0], Weight):
                return leaf(node._args[0])
            return node._data if node._func is None else node._func(*value(node._args), **node._kwargs)

        if hasattr(self.lazy, "_chunks"):  # experts, which the converter writes in parts
            made = numpy.concatenate([chunk() for chunk in self.lazy._chunks])
        else:
            made = numpy.asarray(value(self.lazy), dtype=numpy.float32)
        return made.reshape(-1, made.shape[-1] if made.ndim else 1)

    def origins(self, rows: Any) -> list[tuple[Weight, int]] | None:
        """Of which weight and row these rows of the tensor are copies, by the graph itself; None where it does more than to choose rows.

        It is run on numbers instead of weights: first each row holds its own number, then each column its own (and
        a half, which no sum or product leaves as it is).
        """
        import numpy
        import torch

        width = self.lazy.shape[-1]
        stacked = any(  # whose rows are whole matrices
            len(w.shape) > 2 and w.adapter.changes(w.name) and not (len(w.shape) == 3 and w.adapter.is_stack(w.name))
            for w in self.weights
        )
        if stacked or not self.weights or any(len(w.shape) < 2 or w.shape[-1] != width for w in self.weights):
            return None
        heights = [math.prod(weight.shape[:-1]) for weight in self.weights]
        starts = numpy.cumsum([0, *heights])
        lines = {w: torch.arange(*starts[i : i + 2], dtype=torch.float32) for i, w in enumerate(self.weights)}
        columns = torch.arange(width, dtype=torch.float32) + 0.5
        try:
            across = self.evaluate(lambda w: columns.expand(w.shape))
            down = self.evaluate(lambda w: lines[w].reshape(*w.shape[:-1], 1).expand(w.shape))
        except RuntimeError:  # an operation that shared memory of `expand` does not allow
            return None
        chosen = down[rows]
        if not (across[rows] == columns.numpy()).all() or (chosen != chosen[:, :1]).any() or starts[-1] >= 1 << 24:
            return None
        numbers = chosen[:, 0].astype(numpy.int64)
        which = numpy.searchsorted(starts, numbers, side="right") - 1
        return [(self.weights[i], int(n - starts[i])) for i, n in zip(which, numbers, strict=True)]

    def parts(self, sample: Any) -> Iterator[tuple[Any, Any, Any]]:
        """(numbers of rows, these rows of the base, and with the adapter in them), all in order or only those of the sample."""
        import numpy

        origins = None if sample is None else self.origins(sample)
        if origins is not None:
            pairs = [weight.row(number) for weight, number in origins]
            base, merged = (numpy.concatenate([pair[i].numpy() for pair in pairs]) for i in (0, 1))
            yield sample, base, merged
            return
        merged = self.evaluate(Weight.merged)
        base = self.evaluate(Weight.base) if self.changed else merged
        step = max(1, CHUNK // merged.shape[1])
        for start in range(0, len(merged) if sample is None else 0, step):
            rows = slice(start, start + step)
            yield rows, base[rows], merged[rows]
        if sample is not None:
            yield sample, base[sample], merged[sample]
