"""How far each tensor of a GGUF is from what it should hold, and how far its type allows."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..errors import VerifyError

# An adapter's share in the file (see `Tally`) is 1; it is told from 1 where its standard error allows.
SHARE_WITHIN, SHARE_ERRORS = 0.1, 6.0
# Half a unit in the last place of bfloat16: a merge that was rounded to it before it was packed, as PEFT's, is right too.
BFLOAT16 = 2.0**-8
F16_MOST, TOO_LARGE = 65504.0, "too large for F16"  # the largest number in float16, and what is said of weights beyond
NO_NUMBER = 1e9  # the error of a weight that is none, or of a tensor of another shape; JSON has no infinity


@dataclass
class Tally:
    """The figures of one tensor, summed up part by part.

    excess: the largest error as a multiple of what its type allows. The adapter's share is the slope of what the file
    adds to the base over what the adapter does, by least squares: 1 where the adapter is in it, 0 where it is
    missing, 1/2 where its scale was halved; packing makes errors that know nothing of the adapter. experts: the same of
    each matrix of a stack, where one without the adapter would hardly show in the whole.
    """

    name: str
    kind: str
    values: int = 0
    largest: float = 0.0
    sum: float = 0.0
    max_error: float = 0.0
    sum_error: float = 0.0
    square_error: float = 0.0
    excess: float = 0.0
    overlap: float = 0.0
    square_change: float = 0.0
    experts: dict[int, Tally] = field(default_factory=dict)

    def add(self, base: Any, merged: Any, found: Any, limit: Any) -> None:
        """Some rows of each, and the largest error that each value may have, float32 (rows, columns)."""
        import numpy

        error = numpy.nan_to_num(found - merged, nan=NO_NUMBER, posinf=NO_NUMBER, neginf=-NO_NUMBER)
        change = merged - base
        size = abs(error)
        self.values += error.size
        self.largest = max(self.largest, float(abs(merged).max()))
        self.sum += float(abs(merged).sum(dtype=numpy.float64))
        self.max_error = max(self.max_error, float(size.max()))
        self.sum_error += float(size.sum(dtype=numpy.float64))
        self.square_error += float(numpy.vdot(error, error))
        self.excess = max(self.excess, float((size / limit).max()))
        self.overlap += float(numpy.vdot(error, change))
        self.square_change += float(numpy.vdot(change, change))

    def add_stack(self, experts: Any, base: Any, merged: Any, found: Any, limit: Any) -> None:
        """The same of a stack; experts: the number of the matrix that each row is of, int64 (rows,)."""
        import numpy

        self.add(base, merged, found, limit)
        for expert in numpy.unique(experts):
            own = experts == expert
            tally = self.experts.setdefault(int(expert), Tally(f"{self.name}, expert {expert},", self.kind))
            tally.add(base[own], merged[own], found[own], limit[own])

    @property
    def share(self) -> float | None:
        """How much of the adapter's change is in the file; None where it changes nothing, or less than can be seen (`is_seen`)."""
        return share_of([self])

    @property
    def failure(self) -> str | None:
        """What differs more than it may."""
        if self.excess > 1 and self.kind == "F16" and self.largest > F16_MOST:
            return f"{self.name} holds weights of {self.largest:.6g}, {TOO_LARGE}, which ends at 65504"
        if self.share is not None and abs(self.share - 1) > within([self]):
            return f"{self.name} holds {self.share:z.2f} of what the adapter does, not 1"
        if one := next((tally.failure for tally in self.experts.values() if tally.failure), None):
            return one
        if self.excess > 1:
            return f"{self.name} differs by {self.excess:.3g} times what {self.kind} allows"
        return None

    def facts(self) -> dict[str, Any]:
        """The figures, relative to the largest weight and to the mean size of a weight."""
        return {
            "name": self.name, "type": self.kind, "values": self.values, "max_error": self.max_error / (self.largest or 1),
            "mean_error": self.sum_error / (self.sum or 1), "excess": self.excess, "adapter_share": self.share,
        }  # fmt: skip


def share_of(tallies: list[Tally]) -> float | None:
    """How much of the adapter's change these tensors hold; None where it changes nothing, or less than can be seen (`is_seen`)."""
    if not is_seen(tallies):
        return None
    return 1 + sum(tally.overlap for tally in tallies) / sum(tally.square_change for tally in tallies)


def share_error(tallies: list[Tally]) -> float:
    """The standard error of the adapter's share over these tensors, some of which it changes."""
    noise = sum(tally.square_error * tally.square_change / tally.values for tally in tallies if tally.values)
    return math.sqrt(noise) / sum(tally.square_change for tally in tallies)


def within(tallies: list[Tally]) -> float:
    """How far from 1 the adapter's share over these tensors may be."""
    return SHARE_WITHIN + SHARE_ERRORS * share_error(tallies)


def is_seen(tallies: list[Tally]) -> bool:
    """Whether the adapter's share, over these tensors, can be told from none of it: not where its change drowns in the rounding."""
    return any(tally.square_change for tally in tallies) and within(tallies) < 1


def allowed(kind: str, expected: Any) -> Any:
    """The largest error of each value that packing it as this type can make; float32 (rows, columns). Raises VerifyError for a type without a rule.

    Q8_0 rounds to steps of 1/127 of the largest of 32 weights: half a step, and the step itself is kept in float16. Types of
    fewer bits search for steps that suit the whole, so that a single weight may be off by more than half of one; by more than
    one whole step of the widest block, (twice the largest weight) / (2^bits - 1), it is not.
    """
    import numpy

    size = abs(expected)
    rounding = {"F32": 0.0, "F16": 2.0**-11, "BF16": BFLOAT16}.get(kind)
    if rounding is not None:
        return size * (BFLOAT16 + rounding) + 2.0**-25  # the last is half of float16's smallest number
    bits = re.match(r"I?Q([2-8])_(K|XS|NL|[01])$", kind)
    if not bits:
        raise VerifyError(
            f"The proof does not know how far the GGUF type {kind} rounds.", "Convert to another type, such as Q8_0."
        )
    block = 256 if bits[2] in ("K", "XS") else 32
    whole = numpy.pad(size, ((0, 0), (0, -size.shape[1] % block))).reshape(len(size), -1, block)
    largest = numpy.repeat(whole.max(-1), block, axis=1)[:, : size.shape[1]]
    if kind == "Q8_0":
        return largest * (1 + BFLOAT16) / 127 / 2 + size * (2.0**-11 + BFLOAT16) + 127 * 2.0**-25
    return largest * 2 / (2 ** int(bits[1]) - 1) + size * BFLOAT16 + 2.0**-24


def conclude(tallies: list[Tally], others: list[str], values: list[str]) -> dict[str, Any]:
    """The figures of the file; others: what is wrong with tensors that were not compared; values: with other values."""
    figures = [tally.facts() for tally in tallies]
    worst = max(figures, key=lambda facts: facts["mean_error"], default={})
    types = Counter(tally.kind for tally in tallies)
    wrong = [*filter(None, (tally.failure for tally in tallies)), *others]
    share, seen = share_of(tallies), is_seen(tallies)
    # A change that drowns in the rounding of each tensor may be seen in all of them.
    lacking = seen and not wrong and abs(share - 1) > within(tallies)
    together = [f"the tensors together hold {share:z.2f} of what the adapter does, not 1"] if lacking else []
    return {
        "tensors": len(tallies) + len(others),
        "wrong_tensors": len(wrong),
        "wrong_values": values,
        "types": dict(types),
        "values": sum(tally.values for tally in tallies),
        "max_error": max((facts["max_error"] for facts in figures), default=0.0),
        "mean_error": worst.get("mean_error", 0.0),
        "worst": worst.get("name"),
        "adapter_share": share,
        "adapter_share_within": within(tallies) if seen else None,
        "adapter_unseen": any(tally.square_change for tally in tallies) and not seen,
        "failures": [*wrong, *together, *values],
    }
