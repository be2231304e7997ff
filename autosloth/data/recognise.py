"""The form of the rows: which column means what."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import DataError
from .schemas import COLUMN_NAMES, SCHEMAS, Schema, plain_name
from .transforms import LABELS, are_numbered, makes_rows, unclear_choice
from .turns import Row, Turn, parsed, turns_in

Roles = dict[str, str]  # the role of a column -> the column

# (form, the roles that it needs, those that it takes besides); the first one that fits wins.
FORMS = {
    "sft": (
        ("messages", ("messages",), ("system", "tools")),
        ("instruction", ("instruction", "completion"), ("input", "system", "history")),
        ("prompt", ("prompt", "completion"), ("input", "system", "tools", "history")),
        ("text", ("text",), ()),
    ),
    "dpo": (
        ("pair", ("instruction", "chosen", "rejected"), ("input", "system", "tools")),
        ("pair", ("prompt", "chosen", "rejected"), ("input", "system", "tools")),
        ("pair", ("messages", "chosen", "rejected"), ("system", "tools")),
        ("pair", ("chosen", "rejected"), ("system", "tools")),
    ),
}
LONG_NAME = 60  # characters: what is longer is no column's name
SAMPLE = 100  # rows that a column's content is judged by
MEDIA = ("image", "images", "video", "videos", "audio", "audios")  # columns of what a text model cannot take in
MEDIA_FILE = re.compile(r"(https?|data):|.*\.(png|jpe?g|gif|webp|bmp|tiff?|mp4|webm|mov|avi|mkv|wav|mp3|flac|ogg|m4a)$", re.IGNORECASE)  # fmt: skip
IGNORE = "ignore"  # what `columns` says of a column that is to be left alone


@dataclass(frozen=True)
class Reading:
    """How rows are read: their form, the column of each role, what transforms them (a name in transforms.py) and what they could be read as too."""

    form: str
    columns: Roles
    schema: Schema | None = None
    others: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What a reader calls it."""
        return self.schema.name if self.schema else self.form

    def told(self) -> str:
        """The columns and what they mean, in words."""
        return ", ".join(column if column == role else f"{column} as {role}" for role, column in self.columns.items())

    def named(self, row: Row) -> Row:
        """A row, its columns named by their roles."""
        return {role: row.get(column) for role, column in self.columns.items()}


def recognise(rows: list[Row], mapping: Roles, name: str, road: Literal["sft", "dpo"] = "sft") -> Reading:
    """How these rows are to be read. `mapping` (column -> role) wins over known names. Raises DataError.

    >>> recognise([{"Question": "1 + 1?", "answer": "2"}], {}, "x").columns
    {'prompt': 'Question', 'completion': 'answer'}
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    roles = column_roles(columns, mapping, name)
    others = {role: column for role, column in roles.items() if role != "messages"}
    some = rows[:SAMPLE]
    with_turns = sum(bool(turns_of(row, roles)) for row in some) if "messages" in roles else 0
    if not with_turns or (2 * with_turns < len(some) and fitting(others, mapping, road)):
        roles = others  # most rows are something else
    common, schema = fitting(roles, mapping, road), None
    if not {role for role in mapping.values() if role != IGNORE}:
        free = [column for column in columns if mapping.get(column) != IGNORE]
        schema = known_schema(rows, free, common, road)
        if road == "sft" and schema is None and common is None and (pairs := known_schema(rows, free, None, "dpo")):
            raise preferences(name, pairs.columns.values())
    if road == "sft" and schema is None and not {"completion", "messages", "text"} & set(mapping.values()):
        refuse_preferences(rows, roles, name)
    found = schema or common
    if found is None:
        raise not_recognised(rows, columns, roles, name, road)
    found = with_choices(found, some, name)
    return replace(found, others=tuple(could_be(found, roles, common, road)))


def with_choices(found: Reading, rows: list[Row], name: str) -> Reading:
    """The reading, of a multiple choice whose answers are numbers from 0 with that told. Raises DataError where they may be numbers or texts."""
    if not found.schema or found.schema.transform != "choices":
        return found
    sample = [found.named(row) for row in rows]
    if unclear := unclear_choice(sample):
        given, texts = unclear
        raise DataError(
            f"The answers of {name} are texts of choices and may be numbers of choices as well: {given} of {', '.join(map(str, texts))}.",
            "Write the answers as letters (A, B, ...).",
        )
    if not are_numbered(sample):
        return found
    told = f"{found.schema.name}, numbered from 0"
    return replace(found, schema=found.schema._replace(name=told, transform="choices_from_zero"))


def known_schema(rows: list[Row], columns: list[str], common: Reading | None, road: str) -> Reading | None:
    """The first schema of the table that these rows are of; None where common names tell more of their columns, or turns or pairs."""
    if common and common.form in ("messages", "pair"):
        return None
    for schema in SCHEMAS:
        found = schema.found_in(columns) if schema.road == road else None
        if found is None or (common and len(schema.columns) < len(common.columns)):
            continue
        reading = Reading(schema.form, found, schema)
        if not rows or makes_rows(schema.transform, [reading.named(row) for row in rows[:SAMPLE]]):
            return reading
    return None


def could_be(found: Reading, roles: Roles, common: Reading | None, road: str) -> Iterator[str]:
    """What these columns could be read as besides, in columns that are not read so already."""
    read, fits = (
        set(found.columns.values()),
        [needed for _, needed, _ in FORMS[road] if all(role in roles for role in needed)],
    )
    for needed in fits:
        columns = [roles[role] for role in needed]
        if not set(columns) <= read:
            yield "/".join(columns)


def turns_of(row: Row, roles: Roles) -> list[Turn]:
    """The turns in the row's column of messages."""
    return turns_in(parsed(row.get(roles.get("messages", ""))), Counter())


def refuse_media(column: str, value: Any, mapping: Roles, name: str) -> None:
    """Raises DataError for a row that comes with a picture, a sound or a video: without it a text model would learn to guess."""
    if plain_name(column) in MEDIA and mapping.get(column) != IGNORE and is_media(value):
        raise media_refused(name, column)


def refuse_late(column: str, row: int, mapping: Roles, name: str) -> None:
    """Raises DataError for a column of a common name that only later rows have: they would be learnt without it."""
    if mapping.get(column) != IGNORE and any(plain_name(column) in names for names in COLUMN_NAMES.values()):
        raise DataError(
            f"Row {row} of {name} is the first one with a column `{column}`; how rows are read is told from the rows at the beginning, which have none.",
            f"Put such a row first, or set `columns: {{{written(column)}: {IGNORE}}}`.",
        )


def is_media(value: Any) -> bool:
    """Whether a value of such a column is a picture, sound or video, or the file or address of one.

    >>> is_media("7.png"), is_media(["a.jpg"]), is_media({"bytes": b"", "path": None}), is_media("a sloth"), is_media([])
    (True, True, True, False, False)
    """
    if isinstance(value, list):
        return any(is_media(each) for each in value)
    return (isinstance(value, (dict, bytes)) and bool(value)) or (
        isinstance(value, str) and bool(MEDIA_FILE.match(value))
    )


def media_refused(name: str, column: str) -> DataError:
    """The error of rows with pictures, sounds or videos."""
    return DataError(
        f"The rows of {name} come with `{column}`, which a text model cannot take in: it would learn to answer without having seen it.",
        f"Choose a dataset of texts, or, where the texts make sense alone, set `columns: {{{column}: {IGNORE}}}`.",
    )


def fitting(roles: Roles, mapping: Roles, road: str) -> Reading | None:
    """The first form whose needed roles are there, one with a mapped role before others, and the columns that it takes."""
    mapped = set(mapping.values())
    for form, needed, optional in sorted(FORMS[road], key=lambda entry: not mapped & set(entry[1])):
        if all(role in roles for role in needed):
            found = {role: roles[role] for role in (*needed, *optional) if role in roles}
            if found.get("input") == found.get("prompt"):
                found.pop("input", None)
            return Reading(form, found)
    return None


def recognise_columns(columns: list[str], mapping: Roles, name: str, road: str = "sft") -> None:
    """Raises DataError when no rows of these columns can be of a form that is known: `recognise`, before there are rows."""
    roles = column_roles(columns, mapping, name)
    if fitting(roles, mapping, road) is None and known_schema([], columns, None, road) is None:
        raise not_recognised([], columns, roles, name, road)


def column_roles(columns: list[str], mapping: Roles, name: str) -> Roles:
    """Each role's column: as mapped, else by its common names. Raises DataError for a mapping that does not fit."""
    unknown = [column for column, role in mapping.items() if column not in columns and role != IGNORE]
    if unknown and set(mapping.values()) <= set(columns) and set(mapping) <= COLUMN_NAMES.keys():
        mapping = {
            role: column for column, role in mapping.items()
        }  # written the other way round, in names that are both
        unknown = []
    if unknown:
        raise DataError(
            f"`columns` names {', '.join(unknown)}, which {name} does not have.", f"It has: {', '.join(columns)}."
        )
    meant = {column: role for column, role in mapping.items() if role != IGNORE}
    roles = {role: column for column, role in meant.items()}
    if len(roles) < len(meant):
        raise DataError(f"`columns` gives two columns of {name} the same meaning.", "Keep one of them.")
    plain = {plain_name(column): column for column in columns if column not in mapping}
    for role, names in COLUMN_NAMES.items():
        present = [plain[each] for each in names if each in plain]
        if present:
            roles.setdefault(role, present[0])
    return roles


def refuse_preferences(rows: list[Row], roles: Roles, name: str) -> None:
    """Raises DataError for rows that tell good answers from bad ones: learnt as they are, the bad ones would be learnt too."""
    some = rows[:SAMPLE]
    labels = {str(row.get(roles.get("label", ""))).strip().lower() for row in rows} - {"none", "nan", ""}
    answers = next((role for role in ("messages", "completion") if role in roles), None)
    if answers and "label" in roles and labels <= LABELS.keys() and not all(LABELS[label] for label in labels):
        raise DataError(
            f"The rows of {name} mark each answer as good or bad (`{roles['label']}`, as KTO takes them): learnt as they are, the bad answers would be learnt too.",
            f"Keep only the good ones, or say with `columns: {{{roles[answers]}: {answers}}}` that all are to be learnt.",
        )
    answered = any(turns[-1]["role"] == "assistant" for row in some if (turns := turns_of(row, roles)))
    if {"chosen", "rejected"} <= roles.keys() and not answered and "completion" not in roles:
        raise preferences(name, (roles["chosen"], roles["rejected"]), f"; to learn the better answers only, set `columns: {{{roles['chosen']}: completion}}`")  # fmt: skip


def preferences(name: str, columns: Iterable[str], besides: str = "") -> DataError:
    """The error of rows that prefer one answer to another, given to a road that learns all answers."""
    return DataError(
        f"The rows of {name} are pairs of a better and a worse answer (`{'`, `'.join(columns)}`).",
        f"AutoSloth-DPO takes them{besides}.",
    )


def not_recognised(rows: list[Row], columns: list[str], roles: Roles, name: str, road: str) -> DataError:
    """The error of columns that make no form of this road, with what to set for these very columns."""
    what = f"The columns of {name} are not recognised: {', '.join(columns) or 'there are none'}."
    if "messages" in columns and "messages" not in roles and rows:
        example = str(rows[0].get("messages"))[:60]
        return DataError(
            f"`messages` of {name} holds no list of turns: {example}.", "Give turns such as {role: user, content: ...}."
        )
    if rows and all(len(column) > LONG_NAME or column.strip()[-1:] in ("?", ".", "!") for column in columns):
        return DataError(
            f"The columns of {name} have no names: its first line is a row ({', '.join(columns)[:80]}).",
            "Write a line of names above it, such as question,answer.",
        )
    guess = guessed(rows, columns, road)
    todo = (
        f"If it is so, set `columns: {guess}`; otherwise name there what each of them means."
        if guess
        else f"Give {NEEDED[road]}."
    )
    if road == "dpo" and "label" in roles and {"completion", "messages"} & roles.keys():
        what = f"The rows of {name} label single answers (as KTO takes them), and none of their prompts has a good and a bad one: DPO learns from pairs."
        todo = f"Give {NEEDED[road]}, or prompts with answers of both labels."
    elif road == "dpo" and not guess and {"completion", "messages"} & roles.keys():
        what, todo = f"The rows of {name} hold one answer each, and no pairs.", f"AutoSloth-SFT takes them. {todo}"
    return DataError(what, todo)


NEEDED = {
    "sft": "a question and an answer in each row (question/answer, prompt/completion, messages), or a text",
    "dpo": "a prompt, a better and a worse answer in each row (prompt/chosen/rejected)",
}
# Words in the names of columns that tell what they mean, in some languages.
WORDS = {
    "prompt": ("prompt", "quest", "ask", "quer", "custom", "user", "human", "input", "instruct", "problem", "request", "source", "title", "frage", "kunde", "pregunta", "client", "domanda", "before"),
    "completion": ("complet", "answer", "repl", "respon", "agent", "assist", "output", "solut", "target", "bot", "antwort", "respuesta", "réponse", "reponse", "risposta", "result", "after"),
    "chosen": ("chosen", "good", "better", "best", "win", "prefer", "accept", "positive", "gut", "besser", "up", "pos"),
    "rejected": ("reject", "bad", "worse", "worst", "los", "dispref", "negative", "schlecht", "down", "neg"),
}  # fmt: skip


def guessed(rows: list[Row], columns: list[str], road: str) -> str | None:
    """A line for `columns`, guessed from the names of the columns that hold texts and from how long these are; None where there are too few.

    >>> guessed([{"id": 1, "customer": "Where is it?", "agent": "On its way to you."}], ["id", "customer", "agent"], "sft")
    '{customer: prompt, agent: completion}'
    """
    lengths = {column: texts_of(rows, column) for column in columns}
    free = [column for column in columns if lengths[column]] if rows else list(columns)
    wanted = ["chosen", "rejected", "prompt"] if road == "dpo" else ["completion", "prompt"]
    if road == "dpo" and not any(word in plain_name(column) for column in free for word in (*WORDS["chosen"], *WORDS["rejected"])):  # fmt: skip
        return None  # of two answers nothing tells the better one
    found: dict[str, str] = {}
    for role in wanted:
        named = [column for column in free if any(word in plain_name(column) for word in WORDS[role])]
        if named:
            found[role] = named[0]
            free.remove(named[0])
    free.sort(key=lambda column: lengths[column])
    for role in wanted:  # of two texts the longer one is the answer more often
        if role not in found and free:
            found[role] = free.pop()
    if road == "sft" and "prompt" not in found and "completion" in found:
        found = {"text": found["completion"]}
    if len(found) < len(wanted) and "text" not in found:
        return None
    order = [role for role in ("prompt", "completion", "chosen", "rejected", "text") if role in found]
    return "{" + ", ".join(f"{written(found[role])}: {role}" for role in order) + "}"


def texts_of(rows: list[Row], column: str) -> float:
    """The mean length of a column's texts in characters; 0 where it holds none, or the same few over and over."""
    texts = [text for row in rows[:SAMPLE] if isinstance(text := row.get(column), str) and text.strip()]
    varied = len(set(texts)) > max(1, len(texts) / 10) or len(texts) < 3
    return sum(map(len, texts)) / len(texts) if texts and varied and not numbers(texts) else 0.0


def numbers(texts: list[str]) -> bool:
    """Whether all of these texts are numbers."""
    return all(re.fullmatch(r"[-+.,\d\s]+", text) for text in texts)


def written(column: str) -> str:
    """A column's name as YAML takes it."""
    return column if re.fullmatch(r"[^\W\d]\w*", column) else json.dumps(column, ensure_ascii=False)
