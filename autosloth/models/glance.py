"""What a model is, for the form, while its name is typed: its size, licence and terms, and what its memory depends on. Run in a process of its own (child_process.py)."""

from __future__ import annotations

from typing import Any

from ..errors import AutoSlothError
from ..hub_client import UNREACHED
from ..settings import ROADS, Settings
from ..values import is_hub_id
from .base import weights_gb
from .memory import adapter_rank, known_counts, known_shape
from .origin import find_origin


def main(request: dict[str, Any]) -> dict[str, Any]:
    """What there is to tell of the model of these settings; `problem` where there is none, nothing where it cannot be asked.

    request: the `road`, and the `values` of its settings. gb: of its weights as they are stored; numbers: how many they are; license: its name;
    gated: the page of terms that have to be agreed to; on_hub: whether it comes from the Hub, which knows of such; shape, counts: by which `memory.expected` tells what it takes; rank: of the adapter that it starts from, if there is one.
    """
    settings = ROADS[request["road"]](**request["values"])
    try:
        told = told_of(settings)
    except AutoSlothError as error:
        return {} if UNREACHED in error.what else {"problem": error.what}
    return told


def told_of(settings: Settings) -> dict[str, Any]:
    """See `main`. Raises ModelError."""
    gb = weights_gb(settings.model, settings.revision)
    origin = find_origin(settings.model_copy(update={"dataset": "demo"}))
    shape = known_shape(settings)
    counts = known_counts(settings) if shape is None else None
    return {
        "gb": gb,
        "numbers": shape.numbers() + shape.beside if shape else counts.narrow + counts.wide if counts else None,
        "active": counts.active if counts else None,
        "license": origin["license_name"] or origin["license"],
        "gated": origin["gated"],
        "on_hub": is_hub_id(settings.model),
        "shape": shape,
        "counts": counts,
        "rank": adapter_rank(settings) if settings.adapter else None,
    }
