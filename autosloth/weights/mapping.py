"""How the base's files name and split the parameters that transformers makes of them (the experts of a stack, say)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ExportError, ModelError
from .stored import Plain, model_headers, parts_in
from .streamed import Shards

ROWS = 4096  # at a time, where two tensors are compared
Cut = Callable[[str, Any], tuple[Any, Any]]  # (a tensor's name, a parameter's A and B) -> those of the tensor


def parts_of(model: Any, base: Path) -> dict[str, tuple[str, Cut | None]]:
    """What transformers makes of each tensor in the base's files: the parameter, and how to cut the tensor out of it if it is a part."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules, shapes, parts, seen = get_model_conversion_mapping(model), model.state_dict(), {}, Counter()
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    names = (name for header in model_headers(base).values() for name in header)
    for name in sorted(names, key=dot_natural_key):
        parameter, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, shapes)
        if parameter not in shapes and name in shapes:
            parameter, pattern = name, None
        rule = next((rule for rule in converters if pattern in rule.source_patterns), None)
        parts[name] = (parameter, rule and cut_of(rule, pattern, seen[parameter, pattern]))
        seen[parameter, pattern] += 1
    return parts


def tied_weights(model: Any, base: Path, parts: dict[str, tuple[str, Cut | None]]) -> dict[str, str]:
    """Parameters that are one weight with another, which is named: as the model says, but for those that the files hold twice and not alike.

    These transformers leaves apart when it loads them. parts: as `parts_of` gives them.
    """
    stored = {}
    for path, header in model_headers(base).items():
        stored |= {parts[name][0]: part for name, part in parts_in(path, header).items()}
    return {
        name: shared
        for name, shared in model.all_tied_weights_keys.items()
        if name not in stored or shared not in stored or is_same(stored[name], stored[shared], Shards(base))
    }


def is_same(one: Plain, other: Plain, shards: Shards) -> bool:
    """Whether two tensors in files are alike, number for number."""
    import numpy

    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    for path in one.paths | other.paths:
        shards.need(path)
    height = math.prod(one.shape[:-1])
    spans = (numpy.arange(first, min(first + ROWS, height)) for first in range(0, height, ROWS))
    return all(bool((one.rows(span) == other.rows(span)).all()) for span in spans)


def refuse_incomplete(model: Any, base: Path, parts: dict[str, tuple[str, Cut | None]], name: str) -> None:
    """Raises ModelError where a model's files hold no tensor for a parameter: transformers would fill it with random numbers, and say so among much else.

    parts: as `parts_of` gives them; name: of the model, for the user.
    """
    known = {parameter for parameter, _ in parts.values()}
    known |= {one for pair in model.all_tied_weights_keys.items() if known & {*pair} for one in pair}
    if missing := [parameter for parameter, _ in model.named_parameters() if parameter not in known]:
        raise ModelError(
            f"The files of {name} lack {len(missing)} of the model's weights, for example {missing[0]}.",
            "Download it again whole, or choose another: training would begin with random numbers there.",
        )


def cut_of(rule: Any, pattern: str, number: int) -> Cut:
    """How to cut a tensor out of the parameter that this rule of transformers makes of many.

    Known are experts in a stack, one above another, and those of several layers side by side in it (gate and up).
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist

    steps = [(type(step), step.dim) for step in rule.operations if hasattr(step, "dim")]
    if steps not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]) or len(rule.operations) != len(
        steps
    ):
        return other_form
    return partial(part_of_stack, number, rule.source_patterns.index(pattern), len(rule.source_patterns))


def part_of_stack(expert: int, layer: int, layers: int, name: str, pair: tuple[Any, Any]) -> tuple[Any, Any]:
    """A and B of one expert in one of the layers that are side by side in a stack."""
    a, b = pair
    return a[expert], b[expert].chunk(layers)[layer]


def other_form(name: str, pair: Any) -> tuple[Any, Any]:
    """Raises ExportError."""
    raise ExportError(
        f"The adapter changes a weight that the base holds in another form ({name}).",
        "Merge it with PEFT and give the result as the base.",
    )
