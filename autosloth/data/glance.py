"""What a dataset is, for the form, while its name is typed: its rows, how they are read, the first of them. Run in a process of its own (child_process.py)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from typing import Any

from ..errors import AutoSlothError
from ..hub_client import UNREACHED, is_offline
from ..retries import persistently
from ..settings import ROADS, Settings
from ..values import is_address, is_hub_id
from .clean import LOOKED_AT, Findings, demo_rows, usable
from .load import dataset_errors, load_raw, look_up, split_names
from .turns import Row

COUNTED = 100_000  # rows of a file, beyond which they are not counted
FROM_HUB = 20  # rows that are fetched
TEXT = 200  # characters of a text that is shown


def main(request: dict[str, Any]) -> dict[str, Any]:
    """What there is to tell of each dataset of these settings, in `parts`; nothing of an address, which is fetched by the run.

    request: the `road`, and the `values` of its settings. rows: how many, None where nobody knows; more: whether there are more than that; read_as: the form in which its
    rows were recognised, and by which columns; first: who says what in the first row that can be learnt from; problem: why there is none.
    """
    settings = ROADS[request["road"]](**request["values"])
    return {"parts": [told_of(settings.of_part(part)) for part in settings.parts]}


def told_of(settings: Settings) -> dict[str, Any]:
    """Of one dataset."""
    name = settings.dataset
    if is_address(name) or (is_hub_id(name) and is_offline()):
        return {}
    found = Findings()
    try:
        rows, count, more = from_hub(settings) if is_hub_id(name) else from_here(settings)
        first = next(usable(rows, name, settings, found, set()), None)
    except AutoSlothError as error:
        return {} if UNREACHED in error.what else {"problem": error.what}
    _, reading = found.readings[0]
    read_as = f"{reading.name} ({reading.told()})"
    return {"rows": count, "more": more, "read_as": read_as, "first": said_in(first) if first else []}


def from_here(settings: Settings) -> tuple[list[Row], int, bool]:
    """The first rows of the demo or of a file, how many there are, and whether more than were counted. Raises DataError."""
    rows = iter(demo_rows(settings.road)[0]) if settings.dataset == "demo" else load_raw(settings)[0]
    first = list(itertools.islice(rows, LOOKED_AT))
    rest = sum(1 for _ in itertools.islice(rows, COUNTED - len(first)))
    return first, len(first) + rest, next(rows, None) is not None


def from_hub(settings: Settings) -> tuple[list[Row], int | None, bool]:
    """The first rows of a dataset on the Hub, of which only the beginning is fetched, and how many there are where its card tells. Raises DataError."""
    from datasets import Audio, Image, Video, load_dataset, load_dataset_builder

    look_up(settings)
    name, config = settings.dataset, settings.dataset_config
    with dataset_errors(name):
        info = persistently(partial(load_dataset_builder, name, config)).info
        split = split_names(name, settings.split)[0]
        stream = persistently(partial(load_dataset, name, config, split=split, streaming=True))
        media = [column for column, kind in (stream.features or {}).items() if isinstance(kind, (Audio, Image, Video))]
        rows = list(itertools.islice(stream.remove_columns(media), FROM_HUB))
    return rows, size_of(settings.split, info.splits or {}), False


def size_of(split: str, splits: Mapping[str, Any]) -> int | None:
    """How many rows a split such as `train[:5000]` has; None where the card does not tell.

    >>> from datasets import SplitInfo
    >>> size_of("train[:10%]", {"train": SplitInfo("train", num_examples=500)}), size_of("train", {})
    (50, None)
    """
    from datasets import ReadInstruction

    sizes = {name: told.num_examples for name, told in splits.items()}
    if not all(sizes.get(name) for name in split_names("", split)):
        return None
    return sum(part.to - part.from_ for part in ReadInstruction.from_spec(split).to_absolute(sizes))


def said_in(row: Row) -> list[tuple[str, str]]:
    """Who says what in a row, or what it holds: (name, text), the texts cut.

    >>> said_in({"text": "Once", "number": 1}), said_in({"prompt": [{"role": "user", "content": "2+2?"}], "chosen": [{"role": "assistant", "content": "4"}]})
    ([('text', 'Once')], [('prompt', '2+2?'), ('chosen', '4')])
    """
    if row.get("messages"):
        parts = [(turn["role"], turn.get("content")) for turn in row["messages"]]
    else:
        held = [(name, row[name]) for name in ("text", "prompt", "chosen", "rejected") if row.get(name)]
        parts = [(name, value if isinstance(value, str) else value[-1].get("content")) for name, value in held]
    return [(name, text if len(text) <= TEXT else f"{text[:TEXT]} ...") for name, text in parts if text]
