"""What stands beside model and dataset in the form, as HTML: what they are, and how much of the GPU's memory will be taken."""

from __future__ import annotations

from typing import Any

from ..hardware import GPU
from ..models import MARGIN, Counts, Shape, at_once_in_words, expected, one_at_once
from ..output import render_html
from ..settings import Settings
from .widgets import AMBER, GREEN, GREY, RED


def about_model(told: dict[str, Any]) -> str:
    """Size, licence and terms of a model, in a line.

    >>> about_model({"numbers": 7.24e9, "active": None, "gb": 4.13, "license": "apache-2.0", "gated": None, "on_hub": True})
    '7.2 billion weights · 4.1 GB to load · apache-2.0 · not gated'
    """
    size = [in_words(told["numbers"])] if told["numbers"] else []
    if told["active"]:
        size[0] += f", {told['active'] / 1e9:.1f} billion of them at work on a token"
    terms = f"gated: agree to its terms at {told['gated']}" if told["gated"] else "not gated" if told["on_hub"] else ""
    return " · ".join(
        filter(None, [*size, f"{told['gb']:.1f} GB to load", told["license"] or "no licence told", terms])
    )


def in_words(numbers: float) -> str:
    """How many weights."""
    return f"{numbers / 1e9:.1f} billion weights" if numbers >= 1e8 else f"{numbers / 1e6:.1f} million weights"


def about_memory(settings: Settings, told: dict[str, Any], gpu: GPU | None) -> str:
    """The parts of the GPU's memory that the training will take, as a bar: green where it has room, amber where it may not have, red where it has none.

    told: what `models/glance.py` found of the model; nothing where its parts are not known.
    """
    shape, counts = (
        kind(*told[name]) if told.get(name) else None for kind, name in ((Shape, "shape"), (Counts, "counts"))
    )
    if shape is None and counts is None:
        return ""
    room, rank = gpu.memory_gb if gpu else 0.0, told["rank"] or settings.lora_r
    parts = expected(settings, shape, counts, room, rank)
    total = sum(part.gb for part in parts)
    lowest = sum(part.gb for part in expected(one_at_once(settings), shape, counts, room, rank))
    state = state_of(total, lowest, room) if gpu else None
    return render_html(
        "form/templates/memory.html.j2", parts=parts, total=total, gpu=gpu, scale=max(total, room), state=state,
        how="about" if shape else "at least", rows=at_once_in_words(settings), length=settings.max_length, grey=GREY,
    )  # fmt: skip


def state_of(total: float, lowest: float, room: float) -> dict[str, str]:
    """The colour of a bar, and in words what it says; in GB: what is expected, what one row at a time takes, what there is. What `check` refuses is red.

    >>> [state_of(*case)["word"] for case in ((6, 5, 15), (14, 9, 15), (30, 20, 15))]
    ['fits', 'may not fit', 'does not fit']
    """
    if lowest > MARGIN * room:
        return {"colour": RED, "word": "does not fit"}
    if MARGIN * total > room:
        return {"colour": AMBER, "word": "may not fit"}
    return {"colour": GREEN, "word": "fits"}


def about_dataset(told: dict[str, Any], settings: Settings) -> str:
    """What a dataset is: its rows, how they are read, the first of them; of several each."""
    names = [part["path"] for part in settings.parts]
    parts = [
        part | {"name": name if len(names) > 1 else ""} for name, part in zip(names, told["parts"], strict=True) if part
    ]
    return render_html("form/templates/dataset.html.j2", parts=parts, grey=GREY, amber=AMBER) if parts else ""
