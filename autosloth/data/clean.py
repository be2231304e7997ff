"""Rows become chats or pairs: unusable and duplicate rows are dropped or refused, and counted; some rows are held out to measure with."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field

from ..demo import dpo_rows, sft_rows
from ..errors import DataError
from ..output import say
from ..settings import Settings
from .load import load_raw
from .normalise import UNUSABLE, Row, fault, fault_of_pair, repair, to_chat, to_pair
from .recognise import recognise

FORMS_OF = {"sft": "sft", "dpo": "dpo", "spin": "sft"}  # the forms of rows that a road takes
MAX_LISTED = 5  # row numbers in a message
AS_JSON = json.JSONEncoder(sort_keys=True, default=str)


@dataclass
class Findings:
    """What was found in the rows and done about it; `lengths` are true token lengths, before anything is cut."""

    read: int = 0
    dropped: Counter = field(default_factory=Counter)
    repaired: Counter = field(default_factory=Counter)
    truncated: int = 0
    answers_not_learnt: int = 0  # of earlier turns that a template renders so that they cannot be found again
    lengths: list[int] = field(default_factory=list)
    form: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    revision: str | None = None


def load_rows(settings: Settings, found: Findings) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out, as chats or, for DPO, pairs; none is in both, nor the prompt of a pair. Raises DataError."""
    if settings.dataset == "demo":
        train, held_out = (usable(rows, "demo", settings, found) for rows in demo_rows(settings.road))
        return without_held_out(train, held_out, found), held_out
    rows, found.revision = load_raw(settings, settings.split)
    train = usable(rows, settings.dataset, settings, found)
    if settings.eval_split:
        rows, _ = load_raw(settings, settings.eval_split)
        held_out = usable(rows, f"{settings.dataset} (eval_split)", settings, found)
        keep, _ = draw(len(held_out), min(settings.eval_rows, len(held_out)), settings.seed)
        found.dropped["more_than_eval_rows"] += len(held_out) - len(keep)
        held_out = [held_out[i] for i in keep]
    else:
        if len(train) < 2:
            todo = "Give at least two that differ: one is held out to measure with."
            raise DataError(f"The dataset {settings.dataset} has only {len(train)} usable row.", todo)
        size = max(1, min(settings.eval_rows, round(len(train) * settings.eval_fraction)))
        taken, left = draw(len(train), size, settings.seed)
        train, held_out = [train[i] for i in left], [train[i] for i in taken]
    return without_held_out(train, held_out, found), held_out


def demo_rows(road: str) -> tuple[list[Row], list[Row]]:
    """The demo's rows for a road, to train on and held out."""
    return dpo_rows() if road == "dpo" else sft_rows()


def usable(rows: list[Row], name: str, settings: Settings, found: Findings) -> list[Row]:
    """The rows as chats or pairs, without those that nothing can be learnt from and those that stand there already; all counted. Raises DataError."""
    if not rows:
        raise DataError(f"The dataset {name} is empty.", "Give one with at least two rows.")
    found.form, found.columns = recognise(rows, settings.columns, name, FORMS_OF[settings.road])
    found.read += len(rows)
    good, wrong = [], {}
    for number, row in enumerate(rows, start=1):
        normalised, repairs, reason = normalise({role: row.get(column) for role, column in found.columns.items()}, found.form)  # fmt: skip
        found.repaired.update(repairs)
        if reason:
            wrong.setdefault(reason, []).append(number)
        else:
            good.append(normalised)
    found.dropped.update({reason: len(numbers) for reason, numbers in wrong.items()})
    if wrong and (settings.bad_rows == "refuse" or not good):
        todo = "Correct them" + (
            ", or set `bad_rows: drop`." if good else ", or say with `columns` what the columns mean."
        )
        raise DataError(f"Of the {len(rows)} rows of {name}, {', '.join(listed(wrong))}.", todo)
    for line in listed(wrong):
        say(f"data: of {len(rows)} rows, {line}: dropped")
    return without_duplicates(good, found) if settings.duplicates == "drop" else good


def normalise(row: Row, form: str) -> tuple[Row, list[str], str | None]:
    """A row, its columns named by their roles, as a chat or a pair; what was repaired; and why nothing can be learnt from it, if so."""
    if form == "pair":
        pair = to_pair(row)
        return pair, [], fault_of_pair(pair)
    chat, repairs = repair(to_chat(row, form))
    return chat, repairs, fault(chat)


def without_duplicates(chats: list[Row], found: Findings) -> list[Row]:
    """Each chat once, where it stands first; the others are counted."""
    distinct: dict[bytes, Row] = {}
    for chat in chats:
        distinct.setdefault(identity(chat), chat)
    found.dropped["duplicate"] += len(chats) - len(distinct)
    return list(distinct.values())


def listed(wrong: dict[str, list[int]]) -> list[str]:
    """How many rows are unusable and why, with the numbers of the first ones.

    >>> listed({"empty_answer": [2, 4]})
    ['2 with an empty answer (rows 2, 4)']
    """
    return [
        f"{len(numbers)} {UNUSABLE[reason]} (rows {', '.join(map(str, numbers[:MAX_LISTED]))}{', ...' if len(numbers) > MAX_LISTED else ''})"
        for reason, numbers in wrong.items()
    ]


def identity(chat: Row) -> bytes:
    """The same for two chats that are the same, and for no others."""
    return hashlib.blake2b(AS_JSON.encode(chat).encode(), digest_size=16).digest()


def draw(count: int, size: int, seed: int) -> tuple[list[int], list[int]]:
    """`size` of the numbers below `count`, by the seed, and the others, each in rising order."""
    import numpy

    shuffled = numpy.random.default_rng(seed).permutation(count).tolist()
    return sorted(shuffled[:size]), sorted(shuffled[size:])


def without_held_out(train: list[Row], held_out: list[Row], found: Findings) -> list[Row]:
    """The rows to train on that are not among those held out, nor pairs for the same prompt; the others are counted."""

    def measured_by(row: Row) -> bytes:
        return identity(row.get("prompt", row))

    measured = {measured_by(row) for row in held_out}
    kept = [row for row in train if measured_by(row) not in measured]
    found.dropped["also_held_out"] += len(train) - len(kept)
    return kept
