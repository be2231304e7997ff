"""Rows become chats or pairs: unusable and duplicate rows are dropped or refused, and counted; some rows are held out to measure with.

Every row ends as one of: learnt as it stands, changed and counted by name, dropped and counted by name, refused.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ..demo import dpo_rows, sft_rows
from ..errors import DataError
from ..output import say
from ..settings import Settings
from .load import load_raw
from .normalise import TURN_KEY, UNUSABLE, Row, fault, fault_of_pair, repair, to_chat, to_pair, unknown_role
from .recognise import Reading, recognise, refuse_media, unused_columns
from .transforms import TRANSFORMS, WHOLE

FORMS_OF = {"sft": "sft", "dpo": "dpo", "spin": "sft"}  # the forms of rows that a road takes
MAX_LISTED = 5  # row numbers in a message
EXAMPLE = 300  # characters of a row that is shown
SAID_IN = ("messages", "text", "tools", "prompt", "chosen", "rejected")  # what makes a row another one
AS_JSON = json.JSONEncoder(sort_keys=True, default=str)


@dataclass
class Findings:
    """What was found in the rows and done about it; `lengths` are true token lengths, before anything is cut."""

    read: int = 0
    dropped: Counter = field(default_factory=Counter)
    changed: Counter = field(default_factory=Counter)  # rows that are learnt otherwise than they stand
    noted: Counter = field(
        default_factory=Counter
    )  # rows, or answers, that are learnt as they stand, and a reader should know of
    refused: dict[str, list[int]] = field(
        default_factory=dict
    )  # what the chat template says against rows, and their numbers
    examples: dict[str, str] = field(
        default_factory=dict
    )  # a row that was changed or dropped, by the name of what was done
    unused: list[str] = field(default_factory=list)  # columns that nothing reads, and keys of turns
    truncated: int = 0
    answers_not_learnt: int = 0  # of earlier turns that a template does not show whole once the chat goes on
    lengths: list[int] = field(default_factory=list)
    form: str = ""
    schema: str | None = None  # the entry of the table in schemas.py that the columns were known by
    others: tuple[str, ...] = ()  # columns that could have been read instead
    columns: dict[str, str] = field(default_factory=dict)
    revision: str | None = None

    def example(self, name: str, row: object) -> None:
        """Keep the row as the example of what was done, if it is the first."""
        if name not in self.examples:
            self.examples[name] = shortened(row)


def shortened(row: object) -> str:
    """A row as JSON text of at most EXAMPLE characters."""
    text = json.dumps(row, ensure_ascii=False, default=str)
    return text if len(text) <= EXAMPLE else text[:EXAMPLE] + " ..."


def as_they_are(rows: list[Row]) -> list[Row]:
    """All of the rows: what is done to them before some are held out, where nothing is."""
    return rows


def load_rows(
    settings: Settings, found: Findings, encode: Callable[[list[Row]], list[Row]] = as_they_are
) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out, as chats or, for DPO, pairs; none is in both, nor the prompt of a pair. Raises DataError.

    encode: what makes the rows ready and leaves out those that do not fit; only of those that are left some are held out.
    """
    if settings.dataset == "demo":
        train, held_out = (encode(usable(rows, "demo", settings, found)) for rows in demo_rows(settings.road))
        return without_held_out(train, held_out, found), held_out
    rows, found.revision = load_raw(settings, settings.split)
    train = usable(rows, settings.dataset, settings, found)
    if len(train) < 2 and not settings.eval_split:
        todo = "Give at least two that differ: one is held out to measure with."
        raise DataError(f"The dataset {settings.dataset} has only {len(train)} usable row.", todo)
    train = encode(train)
    if settings.eval_split:
        rows, _ = load_raw(settings, settings.eval_split)
        held_out = encode(usable(rows, f"{settings.dataset} (eval_split)", settings, found))
        keep, _ = draw(len(held_out), min(settings.eval_rows, len(held_out)), settings.seed)
        found.dropped["more_than_eval_rows"] += len(held_out) - len(keep)
        held_out = [held_out[i] for i in keep]
    elif len(train) < 2:
        held_out = []
    else:
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
    reading = recognise(rows, settings.columns, name, FORMS_OF[settings.road])
    found.form, found.columns = reading.form, reading.columns
    found.schema, found.others = reading.schema and reading.schema.name, reading.others
    refuse_media(rows, found.columns, settings.columns, name)
    found.unused += [column for column in unused_columns(rows, found.columns) if column not in found.unused]
    good, wrong, count = [], {}, 0
    for number, row, notes in made_of(rows, reading, settings):
        count += 1
        normalised, reason = (row, row) if isinstance(row, str) else normalise(row, reading.form, notes)
        if reason:
            name_of = f" `{unknown_role(normalised)}`" if reason == "unknown_role" else ""
            wrong.setdefault((reason, name_of), []).append(number)
            found.example(reason, rows[number - 1])
            continue
        good.append(normalised | {"number": number})
        if notes:
            count_notes(notes, rows[number - 1], found)
    found.read += count
    if count != len(rows):
        say(f"data: {len(rows)} rows of {name} make {count}")
    for (reason, _), numbers in wrong.items():
        found.dropped[reason] += len(numbers)
    if wrong and (settings.bad_rows == "refuse" or not good):
        todo = "Correct them" + (
            ", or set `bad_rows: drop`." if good else ", or say with `columns` what the columns mean."
        )
        raise DataError(f"Of the {len(rows)} rows of {name}, {', '.join(listed(wrong))}.", todo)
    for line in listed(wrong):
        say(f"data: of {len(rows)} rows, {line}: dropped")
    return without_duplicates(good, found) if settings.duplicates == "drop" else good


def made_of(rows: list[Row], reading: Reading, settings: Settings) -> Iterator[tuple[int, Row | str, Counter]]:
    """What the rows make, their columns named by their roles: the number of the row, what it makes or why it makes nothing, and what was changed."""
    transform, pairs = reading.schema and reading.schema.transform, getattr(settings, "pairs", "best")
    if transform in WHOLE:
        made, left = WHOLE[transform]([reading.named(row) for row in rows], pairs)
        yield from ((number, row, Counter()) for number, row in made)
        yield from ((number, reason, Counter()) for reason, numbers in left.items() for number in numbers)
        return
    for number, row in enumerate(rows, start=1):
        notes: Counter = Counter()
        made = TRANSFORMS[transform](reading.named(row), notes, pairs) if transform else [reading.named(row)]
        for each in [made or "other_form"] if isinstance(made or "", str) else made:
            yield number, each, notes


def normalise(row: Row, form: str, notes: Counter) -> tuple[Row, str | None]:
    """A row, its columns named by their roles, as a chat or a pair, and why nothing can be learnt from it, if so; `notes` counts what was changed."""
    if form == "pair":
        pair = to_pair(row, notes)
        return pair, fault_of_pair(pair)
    chat = repair(to_chat(row, form, notes), notes)
    return chat, fault(chat)


def count_notes(notes: Counter, row: Row, found: Findings) -> None:
    """Count what was changed of a row, once for the row; keys of its turns that nothing reads are unused."""
    for name in +notes:
        if name.startswith(TURN_KEY):
            if name not in found.unused:
                found.unused.append(name)
        else:
            found.changed[name] += 1
            found.example(name, row)


def without_duplicates(chats: list[Row], found: Findings) -> list[Row]:
    """Each chat once, where it stands first; the others are counted."""
    distinct: dict[bytes, Row] = {}
    for chat in chats:
        distinct.setdefault(identity(chat), chat)
    found.dropped["duplicate"] += len(chats) - len(distinct)
    return list(distinct.values())


def listed(wrong: dict[tuple[str, str], list[int]]) -> list[str]:
    """How many rows are unusable and why, with what is named in them and the numbers of the first ones.

    >>> listed({("empty_answer", ""): [2, 4]})
    ['2 with an empty answer (rows 2, 4)']
    """
    return [f"{len(numbers)} {UNUSABLE[reason]}{named} ({numbered(numbers)})" for (reason, named), numbers in wrong.items()]  # fmt: skip


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


def without_held_out(train: list[Row], held_out: list[Row], found: Findings) -> list[Row]:
    """The rows to train on that are not among those held out, nor pairs for the same prompt; the others are counted."""

    def measured_by(row: Row) -> bytes:
        return identity({"prompt": row["prompt"]} if "prompt" in row else row)

    measured = {measured_by(row) for row in held_out}
    kept = [row for row in train if measured_by(row) not in measured]
    found.dropped["also_held_out"] += len(train) - len(kept)
    return kept
