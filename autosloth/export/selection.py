"""Whether llama.cpp's converter only picks whole rows of a weight, found out by running it on stand-ins.

A choice of rows can be made block by block, whatever the size of the tensor; what is computed has to be evaluated as a whole.
"""

from __future__ import annotations

import math
from typing import Any

from .quantize import Selection, Weight


def choose_rows(graph: Any) -> Selection | None:
    """What the converter does to weights, where that is a choice of whole rows in some order; else None.

    Its own graph is run on two stand-ins: one in which each number tells its row, one in which each tells its column.
    They take the room of a row or a column, and what comes out unchanged was moved and not computed.
    """
    import numpy

    weights, width = find_weights(graph), graph.shape[-1]
    if not weights or any(w.shape[-1] != width or not w.has_rows for w in weights):
        return None
    starts = numpy.cumsum([0, *(math.prod(weight.shape[:-1]) for weight in weights)])
    if starts[-1] >= 1 << 23:  # where float32 has no halves any more
        return None
    tell_row, tell_column = {}, {}
    for weight, first, last in zip(weights, starts[:-1], starts[1:], strict=True):
        tell_row[weight] = row_numbers(numpy.arange(first, last)).reshape(*weight.shape[:-1], 1).expand(weight.shape)
        tell_column[weight] = column_numbers(width).expand(weight.shape)
    try:
        rows, columns = (evaluate(graph, stand_ins) for stand_ins in (tell_row, tell_column))
    except (RuntimeError, TypeError, ValueError):  # arithmetic that stand-ins of this kind and stride do not bear
        return None
    if rows.shape != tuple(graph.shape) or columns.shape != rows.shape:
        return None
    rows, columns = rows.reshape(-1, width), columns.reshape(-1, width)
    wanted = numpy.floor(abs(rows[:, 0])).astype(numpy.int64)
    moved = (
        constant(rows, 1) and numpy.array_equal(rows[:, 0], row_numbers(wanted).numpy()) and max(wanted) < starts[-1]
    )
    moved = moved and constant(columns, 0) and numpy.array_equal(columns[0], column_numbers(width).numpy())
    return Selection(weights, starts, wanted) if moved else None


def row_numbers(rows: Any) -> Any:
    """float32, for each row i (-1)^i (i + 1/2): no sum, product or absolute value of them is another one in its place."""
    import torch

    return torch.from_numpy(((rows + 0.5) * (1 - 2 * (rows % 2))).astype("float32"))


def column_numbers(width: int) -> Any:
    """float32 (width,): different for each column, of the size and sign of weights, and with bits that rounding would change."""
    import numpy
    import torch

    golden = (5**0.5 - 1) / 2  # of whose multiples the fractions lie nowhere close together
    return torch.from_numpy((numpy.arange(1, width + 1) * golden % 1 - 0.5).astype("float32"))


def constant(matrix: Any, axis: int) -> bool:
    """Whether a matrix is the same all along an axis; a view that was never spread out is, by its strides."""
    return matrix.strides[axis] == 0 or bool((matrix == matrix.take([0], axis)).all())


def find_weights(node: Any) -> list[Weight]:
    """The weights that a lazy tensor of the converter is made of, each once."""
    import gguf

    found: dict[Weight, None] = {}

    def visit(node: Any) -> Any:
        if not hasattr(node, "_args"):
            return node
        if node._args and isinstance(node._args[0], Weight):
            found[node._args[0]] = None
        elif node._data is None:
            gguf.LazyBase._recurse_apply(node._args, visit)
        return node

    visit(node)
    return list(found)


def evaluate(node: Any, stand_ins: dict[Weight, Any]) -> Any:
    """What a lazy tensor would be if its weights were these; unlike the converter's own evaluation it keeps nothing."""
    import gguf

    if node._args and isinstance(node._args[0], Weight):
        return stand_ins[node._args[0]]
    if node._data is not None:
        return node._data
    arguments = gguf.LazyBase._recurse_apply(node._args, lambda part: evaluate(part, stand_ins))
    return node._func(*arguments, **node._kwargs)
