"""Rows become chats or pairs: unusable and duplicate rows are dropped or refused, and counted; some rows are held out to measure with.

Every row ends as one of: learnt as it stands, changed and counted by name, dropped and counted by name, refused.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..demo import dpo_rows, sft_rows
from ..errors import DataError
from ..output import say
from ..settings import Settings
from ..values import is_address, public_address
from .load import load_raw
from .normalise import UNUSABLE, fault, fault_of_pair, printable, repair, to_chat, to_pair, unknown_role
from .recognise import Reading, recognise, refuse_late, refuse_media
from .transforms import TRANSFORMS, WHOLE
from .turns import NOTHING, TURN_KEY, Row, text_of

FORMS_OF = {"sft": "sft", "dpo": "dpo", "spin": "sft"}  # the forms of rows that a road takes
LOOKED_AT = 1000  # rows that tell the form
UNUSED = "unused "  # before a column's name, among the examples
MAX_LISTED = 5  # row numbers in a message
EXAMPLE = 300  # characters of a row that is shown
SAID_IN = ("messages", "text", "tools", "prompt", "chosen", "rejected")  # what makes a row another one
AS_JSON = json.JSONEncoder(sort_keys=True, default=str)


class ByReason:
    """Rows by the reason why they are left out: how many, and the numbers of the first ones.

    >>> left = ByReason()
    >>> left.add("too_odd", 2)
    >>> left.listed()
    [('too_odd', 1, 'rows 2')]
    """

    def __init__(self):
        self.count: Counter = Counter()
        self.first: dict[Hashable, list[int]] = {}

    def add(self, reason: Hashable, number: int) -> None:
        """One more row."""
        self.count[reason] += 1
        if self.count[reason] <= MAX_LISTED + 1:
            self.first.setdefault(reason, []).append(number)

    def listed(self) -> list[tuple[Any, int, str]]:
        """Each reason, how many rows, and the first ones."""
        return [(reason, count, numbered(self.first[reason])) for reason, count in self.count.items()]


@dataclass
class Findings:
    """What was found in the rows and done about it; `lengths` are true token lengths, before anything is cut."""

    read: int = 0
    dropped: Counter = field(default_factory=Counter)
    changed: Counter = field(default_factory=Counter)  # rows that are learnt otherwise than they stand
    noted: Counter = field(
        default_factory=Counter
    )  # rows, or answers, that are learnt as they stand, and a reader should know of
    refused: ByReason = field(default_factory=ByReason)  # rows by what the chat template says against them
    examples: dict[str, str] = field(
        default_factory=dict
    )  # a row that was changed or dropped, by the name of what was done
    unused: list[str] = field(default_factory=list)  # columns that nothing reads, and keys of turns
    truncated: int = 0
    cut_tokens: int = 0  # of these, beyond max_length
    answers_not_learnt: int = 0  # of earlier turns that a template does not show whole once the chat goes on
    lengths: list[int] = field(default_factory=list)
    readings: list[tuple[str, Reading]] = field(default_factory=list)  # of each dataset and split, how it is read
    revisions: dict[str, str] = field(default_factory=dict)  # of each dataset from the Hub, by its id, the commit
    usable: int = 0  # rows that could be learnt from, were they shown whole and short enough

    def example(self, name: str, row: object) -> None:
        """Keep the row as the example of what was done, if it is the first."""
        if name not in self.examples:
            self.examples[name] = shortened(row)


def shortened(row: object) -> str:
    """A row as JSON text of at most EXAMPLE characters."""
    text = printable(json.dumps(row, ensure_ascii=False, default=str))
    return text if len(text) <= EXAMPLE else text[:EXAMPLE] + " ..."


def streams(settings: Settings, found: Findings) -> tuple[Iterator[Row], Iterator[Row] | None]:
    """The usable rows, one at a time: those of `split`, and those to measure with where they are given apart. Raises DataError as they are read."""
    if settings.dataset == "demo":
        train, held_out = demo_rows(settings.road)
        return usable(train, "demo", settings, found, set()), usable(held_out, "demo", settings, found, set())
    train = mixed(settings, None, found)
    return train, mixed(settings, settings.eval_split, found) if settings.eval_split else None


def mixed(settings: Settings, eval_split: str | None, found: Findings) -> Iterator[Row]:
    """The usable rows of all datasets, one after the other, of each the share that is asked for, drawn by the seed."""
    seen: set[bytes] = set()
    for part in settings.parts:
        alone, name = settings.of_part(part), part["path"] + (" (eval_split)" if eval_split else "")
        if part["path"] == "demo":
            rows = demo_rows(settings.road)[bool(eval_split)]
        else:
            rows, commit = load_raw(alone, "eval_split" if eval_split else "split")
            found.revisions |= {part["path"]: commit} if commit else {}
        taken = 0
        for row in usable(rows, name, alone, found, seen, part["share"]):
            taken += 1
            yield row
        if len(settings.parts) > 1:
            say(f"data: {taken} rows of {name}")


def refuse_single(found: Findings, settings: Settings) -> None:
    """Raises DataError where so few rows are usable that none could be held out of them."""
    if found.usable < 2 and settings.dataset != "demo" and not settings.eval_split:
        todo = "Give at least two that differ: one is held out to measure with."
        raise DataError(f"The dataset {settings.dataset_name} has only {found.usable} usable row.", todo)


def draw_parts(
    train: list[bytes], held_out: list[bytes] | None, settings: Settings, found: Findings
) -> tuple[list[int], list[int]]:
    """Which rows are trained on and which are held out, by their keys (`measured_by`): none is in both. held_out: rows given apart, if there are some."""
    if held_out is None:
        if len(train) < 2:
            return list(range(len(train))), []
        size = max(1, min(settings.eval_rows, round(len(train) * settings.eval_fraction)))
        taken, left = draw(len(train), size, settings.seed)
        keys = [train[i] for i in taken]
    else:
        most = len(held_out) if settings.dataset == "demo" else settings.eval_rows
        taken, _ = draw(len(held_out), min(most, len(held_out)), settings.seed)
        found.dropped["more_than_eval_rows"] += len(held_out) - len(taken)
        keys, left = [held_out[i] for i in taken], range(len(train))
    measured = set(keys)
    kept = [i for i in left if train[i] not in measured]
    found.dropped["also_held_out"] += len(left) - len(kept)
    return kept, taken


def look_through(settings: Settings, found: Findings, alone: bool) -> None:
    """Read all rows as `streams` gives them, keeping none; alone: no other rows come besides. Raises DataError."""
    for rows in streams(settings, found):
        for _ in rows or ():
            pass
    if alone:
        refuse_single(found, settings)


def report_readings(found: Findings) -> None:
    """Say how the rows are read, how they could be read too, and which columns and keys of turns nothing reads."""
    lines = []
    for name, reading in found.readings:
        name = public_address(name) if is_address(name) else name
        lines.append(f"data: {name} read as {reading.name} ({reading.told()})")
        lines += [
            f"data: {other} could be read too; if that is meant, say so with `columns`" for other in reading.others
        ]
    for line in dict.fromkeys(lines):  # the demo's rows to measure with are read as those to train on
        say(line)
    if found.unused:
        say(f"data: not used: {', '.join(name.removeprefix(TURN_KEY) for name in found.unused)}")


def demo_rows(road: str) -> tuple[list[Row], list[Row]]:
    """The demo's rows for a road, to train on and held out."""
    return dpo_rows() if road == "dpo" else sft_rows()


def usable(
    rows: Iterable[Row], name: str, settings: Settings, found: Findings, seen: set[bytes], share: float = 1
) -> Iterator[Row]:
    """The rows as chats or pairs, without those that nothing can be learnt from and those that stand there already; all counted. Raises DataError.

    seen: the keys of rows that stand there already; those of these rows are added. share: of the rows that are taken, drawn by the seed.
    """
    numbers = random.Random(f"{settings.seed} {len(found.readings)}")  # another one for each dataset, wherever it lies
    rows = iter(rows)
    first = list(itertools.islice(rows, LOOKED_AT))
    if not first:
        raise DataError(f"The dataset {name} is empty.", "Give one with at least two rows.")
    reading = recognise(first, settings.columns, name, FORMS_OF[settings.road])
    if settings.road == "spin" and reading.form == "text":
        raise DataError(
            f"The rows of {name} are plain texts; self-play needs questions with their answers.",
            "AutoSloth-SFT learns texts.",
        )
    found.readings.append((name, reading))
    wrong, columns = ByReason(), Columns(first, reading, settings.columns, name)
    good = made = 0
    for number, raw, row, notes in made_of(columns.watched(itertools.chain(first, rows)), reading, settings):
        made += 1
        normalised, reason = (row, row) if isinstance(row, str) else normalise(row, reading.form, notes)
        if reason and holds_elsewhere(raw, reading):
            reason = "other_form"
        if reason:
            wrong.add((reason, f" `{unknown_role(normalised)}`" if reason == "unknown_role" else ""), number)
            found.example(reason, raw)
            continue
        good += 1
        if share < 1 and numbers.random() >= share:
            found.dropped["beyond_its_share"] += 1
            continue
        if settings.duplicates == "drop" and is_again(normalised, seen):
            found.dropped["duplicate"] += 1
            found.example("duplicate", raw)
            continue
        found.usable += 1
        yield normalised | {"number": number, "changes": count_notes(notes, raw, found)}
    found.read += made
    found.unused = [*dict.fromkeys([*columns.unused, *found.unused])]
    found.examples.update({f"{UNUSED}{column}": value for column, value in columns.unused.items()})
    if made != columns.rows:
        say(f"data: {columns.rows} rows of {name} make {made}")
    for (reason, _), count in wrong.count.items():
        found.dropped[reason] += count
    told = [f"{count} {UNUSABLE[reason]}{named} ({first})" for (reason, named), count, first in wrong.listed()]
    if told and (settings.bad_rows == "refuse" or not good):
        todo = (
            "Correct them, or set `bad_rows: drop`."
            if good
            else "Correct them, or say with `columns` what the columns mean."
        )
        if not all(row.keys() & first[0].keys() for row in first):
            todo = "Files with other columns are datasets of their own: `dataset: [one.jsonl, other.jsonl]`."
        raise DataError(f"Of the {columns.rows} rows of {name}, {', '.join(told)}.", todo)
    for line in told:
        say(f"data: of {columns.rows} rows, {line}: dropped")


def holds_elsewhere(row: Row, reading: Reading) -> bool:
    """Whether a row says something, though nothing in the columns that are read."""
    filled = {column for column, value in row.items() if text_of(value) not in NOTHING}
    return bool(filled) and filled.isdisjoint(reading.columns.values())


def made_of(rows: Iterable[Row], reading: Reading, settings: Settings) -> Iterator[tuple[int, Row, Row | str, Counter]]:
    """What the rows make: the number of the row, the row, what it makes, its columns named by their roles, or why it makes nothing, and what was changed."""
    transform, pairs = reading.schema and reading.schema.transform, getattr(settings, "pairs", "best")
    if transform in WHOLE:
        every = list(rows)
        made, left = WHOLE[transform]([reading.named(row) for row in every], pairs)
        yield from ((number, every[number - 1], row, Counter()) for number, row in made)
        yield from ((i, every[i - 1], reason, Counter()) for reason, numbers in left.items() for i in numbers)
        return
    for number, row in enumerate(rows, start=1):
        notes: Counter = Counter()
        made = TRANSFORMS[transform](reading.named(row), notes, pairs) if transform else [reading.named(row)]
        for each in [made or "other_form"] if isinstance(made or "", str) else made:
            yield number, row, each, Counter(notes)


class Columns:
    """Watches the rows go by: how many they are, and which columns that nothing reads hold something."""

    def __init__(self, first: list[Row], reading: Reading, mapping: dict[str, str], name: str):
        self.known = {column for row in first for column in row}
        self.read, self.mapping, self.name = set(reading.columns.values()), mapping, name
        self.rows, self.unused = 0, {}

    def watched(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The same rows. Raises DataError for one that comes with a picture, a sound or a video, or with a column that would be read had it come sooner."""
        for self.rows, row in enumerate(rows, start=1):
            for column in [column for column in row if column not in self.read]:
                if column not in self.known and row[column] not in (None, ""):
                    refuse_late(column, self.rows, self.mapping, self.name)
                    self.known.add(column)
                refuse_media(column, row[column], self.mapping, self.name)
                if column not in self.unused and row[column] not in (None, ""):
                    self.unused[column] = shortened(row[column])
            yield row


def normalise(row: Row, form: str, notes: Counter) -> tuple[Row, str | None]:
    """A row, its columns named by their roles, as a chat or a pair, and why nothing can be learnt from it, if so; `notes` counts what was changed."""
    if form == "pair":
        pair = to_pair(row, notes)
        return pair, fault_of_pair(pair)
    chat = repair(to_chat(row, form, notes), notes)
    return chat, fault(chat)


def count_notes(notes: Counter, row: Row, found: Findings) -> list[str]:
    """Count what was changed of a row, once for the row; keys of its turns that nothing reads are unused. The names of the changes."""
    told = [name for name, count in notes.items() if count > 0]
    for name in told:
        if name.startswith(TURN_KEY) and name not in found.unused:
            found.unused.append(name)
    changes = [name for name in told if not name.startswith(TURN_KEY)]
    for name in changes:
        found.changed[name] += 1
        found.example(name, row)
    return changes


def is_again(chat: Row, seen: set[bytes]) -> bool:
    """Whether a chat or a pair has been seen before; it is remembered."""
    key = identity(chat)
    again = key in seen
    seen.add(key)
    return again


def numbered(numbers: list[int]) -> str:
    """The first of these rows' numbers.

    >>> numbered([2]), numbered([1, 2, 3, 4, 5, 6])
    ('rows 2', 'rows 1, 2, 3, 4, 5, ...')
    """
    return f"rows {', '.join(map(str, numbers[:MAX_LISTED]))}{', ...' if len(numbers) > MAX_LISTED else ''}"


def identity(chat: Row) -> bytes:
    """The same for two chats or pairs that say the same, and for no others."""
    said = {name: chat[name] for name in SAID_IN if name in chat}
    return hashlib.blake2b(AS_JSON.encode(said).encode(), digest_size=16).digest()


def draw(count: int, size: int, seed: int) -> tuple[list[int], list[int]]:
    """`size` of the numbers below `count`, by the seed, and the others, each in rising order."""
    import numpy

    shuffled = numpy.random.default_rng(seed).permutation(count).tolist()
    return sorted(shuffled[:size]), sorted(shuffled[size:])


def measured_by(row: Row) -> bytes:
    """What must not be in both parts: a chat, or the prompt of a pair."""
    return identity({"prompt": row["prompt"]} if "prompt" in row else row)
