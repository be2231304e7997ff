"""How the base's files name and split the parameters that transformers makes of them (the experts of a stack, say)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ExportError
from .stored import model_headers

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
