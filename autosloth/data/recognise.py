"""The form of the rows: which column means what."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, Literal

from ..errors import DataError
from .normalise import Row, Turn, parsed, turns_in

Roles = dict[str, str]  # the role of a column -> the column

# What columns are commonly called (capitals, spaces and dashes do not count); the first name that is present wins.
COLUMN_NAMES = {
    "messages": ("messages", "conversations", "conversation", "chat", "dialogue", "turns"),
    "instruction": ("instruction", "instructions"),
    "prompt": ("prompt", "question", "query", "problem", "user", "human", "input", "inputs", "user_prompt"),
    "completion": ("completion", "answer", "response", "output", "solution", "assistant", "reply", "target", "targets"),
    "input": ("input", "context"),
    "system": ("system", "system_prompt", "system_message"),
    "tools": ("tools", "functions"),
    "text": ("text", "content"),
    "chosen": ("chosen", "real", "accepted", "preferred", "chosen_response"),
    "rejected": ("rejected", "generated", "dispreferred", "rejected_response"),
    "label": ("label", "labels", "kto_tag"),
    "history": ("history",),
}
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
SAMPLE = 100  # rows that a column's content is judged by
MEDIA = ("image", "images", "video", "videos", "audio", "audios")  # columns of what a text model cannot take in
MEDIA_FILE = re.compile(r"(https?|data):|.*\.(png|jpe?g|gif|webp|bmp|tiff?|mp4|webm|mov|avi|mkv|wav|mp3|flac|ogg|m4a)$", re.IGNORECASE)  # fmt: skip
IGNORE = "ignore"  # what `columns` says of a column that is to be left alone


def recognise(rows: list[Row], mapping: Roles, name: str, road: Literal["sft", "dpo"] = "sft") -> tuple[str, Roles]:
    """The form of rows and which column plays which role. `mapping` (column -> role) wins over the common names. Raises DataError.

    >>> recognise([{"Question": "1 + 1?", "answer": "2"}], {}, "x")
    ('prompt', {'prompt': 'Question', 'completion': 'answer'})
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    roles = column_roles(columns, mapping, name)
    if "messages" in roles and not any(turns_of(row, roles) for row in rows[:SAMPLE]):
        del roles["messages"]
    if road == "sft" and not {"completion", "messages", "text"} & set(mapping.values()):
        refuse_preferences(rows, roles, name)
    form = fitting(roles, mapping, road)
    if form is None:
        raise not_recognised(rows, columns, roles, name, road)
    return form


def turns_of(row: Row, roles: Roles) -> list[Turn]:
    """The turns in the row's column of messages."""
    return turns_in(parsed(row.get(roles.get("messages", ""))), Counter())


def unused_columns(rows: list[Row], roles: Roles) -> list[str]:
    """The columns that hold something and that nothing reads, in the order of the rows.

    >>> unused_columns([{"text": "a", "label": 1, "note": None}], {"text": "text"})
    ['label']
    """
    read = set(roles.values())
    holding = (column for row in rows for column, value in row.items() if column not in read and value not in (None, ""))  # fmt: skip
    return list(dict.fromkeys(holding))


def refuse_media(rows: list[Row], roles: Roles, mapping: Roles, name: str) -> None:
    """Raises DataError for rows that come with pictures, sounds or videos: without them a text model would learn to guess."""
    known = set(roles.values()) | {column for column, role in mapping.items() if role == IGNORE}
    for row in rows:
        for column, value in row.items():
            if column not in known and plain_name(column) in MEDIA and is_media(value):
                raise media_refused(name, column)


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


def plain_name(column: str) -> str:
    """A column's name without capitals, blanks and dashes."""
    return re.sub(r"[\s-]+", "_", column.strip().lower())


def fitting(roles: Roles, mapping: Roles, road: str) -> tuple[str, Roles] | None:
    """The first form whose needed roles are there, one with a mapped role before others, and the columns that it takes."""
    mapped = set(mapping.values())
    for form, needed, optional in sorted(FORMS[road], key=lambda entry: not mapped & set(entry[1])):
        if all(role in roles for role in needed):
            found = {role: roles[role] for role in (*needed, *optional) if role in roles}
            if found.get("input") == found.get("prompt"):
                found.pop("input", None)
            return form, found
    return None


def recognise_columns(columns: list[str], mapping: Roles, name: str, road: str = "sft") -> None:
    """Raises DataError when no rows of these columns can be of a form that is known: `recognise`, before there are rows."""
    roles = column_roles(columns, mapping, name)
    if fitting(roles, mapping, road) is None:
        raise not_recognised([], columns, roles, name, road)


def column_roles(columns: list[str], mapping: Roles, name: str) -> Roles:
    """Each role's column: as mapped, else by its common names. Raises DataError for a mapping that does not fit."""
    unknown = [column for column in mapping if column not in columns]
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
    labels = {str(row.get(roles.get("label", ""))).lower() for row in some}
    answers = next((role for role in ("messages", "completion") if role in roles), None)
    if answers and labels <= {"true", "false"}:
        raise DataError(
            f"The rows of {name} mark each answer as good or bad (`{roles['label']}`, as KTO takes them): learnt as they are, the bad answers would be learnt too.",
            f"Keep only the good ones, or say with `columns: {{{roles[answers]}: {answers}}}` that all are to be learnt.",
        )
    answered = any(turns[-1]["role"] == "assistant" for row in some if (turns := turns_of(row, roles)))
    if {"chosen", "rejected"} <= roles.keys() and not answered and "completion" not in roles:
        raise DataError(
            f"The rows of {name} are pairs of a better and a worse answer (`{roles['chosen']}`, `{roles['rejected']}`).",
            f"AutoSloth-DPO takes them; to learn the better answers only, set `columns: {{{roles['chosen']}: completion}}`.",
        )


def not_recognised(rows: list[Row], columns: list[str], roles: Roles, name: str, road: str) -> DataError:
    """The error of columns that make no form of this road."""
    what = f"The columns of {name} are not recognised: {', '.join(columns) or 'there are none'}."
    if "messages" in columns and "messages" not in roles and rows:
        example = str(rows[0].get("messages"))[:60]
        return DataError(
            f"`messages` of {name} holds no list of turns: {example}.", "Give turns such as {role: user, content: ...}."
        )
    if road == "sft":
        return DataError(
            what,
            "Use instruction/input/output, question/answer, prompt/completion, messages or text, or say what they mean, for example `columns: {frage: prompt, antwort: completion}`.",
        )
    todo = "Use prompt/chosen/rejected, or say what they mean, for example `columns: {frage: prompt, gut: chosen, schlecht: rejected}`."
    if "label" in roles and {"completion", "messages"} & roles.keys():
        return DataError(
            f"The rows of {name} label single answers (as KTO takes them), and DPO learns from pairs.", todo
        )
    if "completion" in roles or "messages" in roles:
        return DataError(f"The rows of {name} hold one answer each, and no pairs.", "AutoSloth-SFT takes them. " + todo)
    return DataError(what, todo)
