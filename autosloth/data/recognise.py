"""The form of the rows: which column means what."""

from __future__ import annotations

import re
from typing import Literal

from ..errors import DataError
from .normalise import Row, turns_in

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
        ("pair", ("instruction", "chosen", "rejected"), ("input", "system")),
        ("pair", ("prompt", "chosen", "rejected"), ("system",)),
        ("pair", ("messages", "chosen", "rejected"), ("system",)),
        ("pair", ("chosen", "rejected"), ("system",)),
    ),
}
SAMPLE = 100  # rows that a column's content is judged by


def recognise(rows: list[Row], mapping: Roles, name: str, road: Literal["sft", "dpo"] = "sft") -> tuple[str, Roles]:
    """The form of rows and which column plays which role. `mapping` (column -> role) wins over the common names. Raises DataError.

    >>> recognise([{"Question": "1 + 1?", "answer": "2"}], {}, "x")
    ('prompt', {'prompt': 'Question', 'completion': 'answer'})
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    roles = column_roles(columns, mapping, name)
    if "messages" in roles and not any(turns_in(row.get(roles["messages"])) for row in rows[:SAMPLE]):
        del roles["messages"]
    if road == "sft" and not {"completion", "messages", "text"} & set(mapping.values()):
        refuse_preferences(rows, roles, name)
    form = fitting(roles, mapping, road)
    if form is None:
        raise not_recognised(rows, columns, roles, name, road)
    return form


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
    roles = {role: column for column, role in mapping.items()}
    if len(roles) < len(mapping):
        raise DataError(f"`columns` gives two columns of {name} the same meaning.", "Keep one of them.")
    plain = {re.sub(r"[\s-]+", "_", column.strip().lower()): column for column in columns if column not in mapping}
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
    answered = any(
        turns[-1]["role"] == "assistant" for row in some if (turns := turns_in(row.get(roles.get("messages", ""))))
    )
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
