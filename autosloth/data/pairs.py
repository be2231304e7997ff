"""Pairs become token ids as TRL's DPOTrainer takes them: a prompt, the chosen answer and the rejected one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

from ..errors import ModelError
from ..settings import Settings
from .clean import Findings
from .encode import (
    IGNORED,
    batches_of,
    beyond,
    changes,
    drop,
    has_special,
    note,
    note_thoughts,
    one_ahead,
    refuse,
    token_from,
    tokenize,
    without_thoughts,
)
from .layout import Placed, Template
from .turns import Row

SIDES = ("chosen", "rejected")


def encode_pairs(
    tokenizer: Any, rows: Iterable[Row], settings: Settings, found: Findings, embeddings: int | None = None
) -> Iterator[Row]:
    """Each pair with `prompt_ids`, `chosen_ids`, `rejected_ids` (int32), as trl 1.15's DataCollatorForPreference joins them.

    Besides, as rows of chats have them, `messages`, `text`, `input_ids` and `labels` of the prompt with the chosen answer, and
    `rejected_text`. Pairs that do not fit are left out and counted.
    """
    template = Template(tokenizer)
    batches = (render_pairs(template, batch, settings, found) for batch in batches_of(rows))
    for rendered, encodings in one_ahead(
        lambda batch: (batch, tokenize(tokenizer, [text for _, sides in batch for text, *_ in sides])), batches
    ):
        for (row, sides), *encoded in zip(rendered, encodings[::2], encodings[1::2], strict=True):
            if any(beyond(each.ids, embeddings) for each in encoded):
                drop("token_beyond_embeddings", row, found)
                continue
            ids = [split_ids(each, *side) for each, side in zip(encoded, sides, strict=True)]
            if fitted := fit(*ids, row, settings, found):
                texts = {"messages": row["prompt"] + row["chosen"], "text": sides[0][0], "rejected_text": sides[1][0]}
                yield row | texts | fitted


def render_pairs(
    template: Template, rows: list[Row], settings: Settings, found: Findings
) -> list[tuple[Row, list[tuple[str, int, int]]]]:
    """Each pair with both its sides as (text, start of the answer, its end); those that the template refuses or does not show whole are left out and counted."""
    rendered = []
    for row in rows:
        row = without_thoughts(row, template, settings, found)
        try:
            sides = [template.place(row["prompt"] + row[side], row.get("tools")) for side in SIDES]
        except ModelError as error:
            refuse(row, error, found)
            continue
        where = [place_of_answer(placed, len(row["prompt"]), len(row["prompt"] + row[side])) for placed, side in zip(sides, SIDES, strict=True)]  # fmt: skip
        missing = next((each for each in where if isinstance(each, str)), None)
        if missing:
            drop(missing, row, found)
            continue
        note(changes(sides[0].layout) | changes(sides[1].layout), row, found)
        note_thoughts(row["prompt"] + row["chosen"], sides[0].layout, settings, found)
        found.noted["special_tokens_in_a_text"] += any(
            has_special(template, row["prompt"] + row[side]) for side in SIDES
        )
        rendered.append((row, where))
    return rendered


def place_of_answer(placed: Placed, first: int, count: int) -> tuple[str, int, int] | str:
    """The text of a prompt and an answer, and where in it the answer starts and ends; else why it cannot be used.

    first: the turn that the answer begins with; count: of turns in all.
    """
    if placed.layout.hidden:
        return "turn_left_out_by_template"
    learnt = {turn: (start, end) for turn, start, end in placed.answers}
    if first not in learnt or count - 1 not in learnt:
        return "answer_not_found_in_template"
    return placed.text, learnt[first][0], learnt[count - 1][1]


def split_ids(encoded: Any, text: str, start: int, end: int) -> tuple[list[int], list[int]]:
    """The ids of a prompt and of the answer to it, what follows its end token left out."""
    first, last = token_from(encoded, start, len(text)), token_from(encoded, end, len(text))
    return encoded.ids[:first], encoded.ids[first:last]


def fit(chosen: tuple, rejected: tuple, row: Row, settings: Settings, found: Findings) -> Row | None:
    """The columns of a pair, its answers cut at max_length; None, counted, for a pair that is to be dropped.

    The prompt is what both sides begin with: where its last character melts with an answer's first into one token, that
    token belongs to the answer.
    """
    import numpy

    prompt = os.path.commonprefix([chosen[0], rejected[0]])
    answers = [side[0][len(prompt) :] + side[1] for side in (chosen, rejected)]
    longest = len(prompt) + max(map(len, answers))
    found.lengths.append(longest)
    if len(prompt) >= settings.max_length:
        return drop("prompt_beyond_max_length", row, found)
    if longest > settings.max_length and settings.long_rows == "drop":
        return drop("longer_than_max_length", row, found)
    answers = [answer[: settings.max_length - len(prompt)] for answer in answers]
    if answers[0] == answers[1]:
        return drop("equal_when_cut" if longest > settings.max_length else "equal_tokens", row, found)
    found.truncated += longest > settings.max_length
    found.cut_tokens += max(0, longest - settings.max_length)
    prompt, chosen, rejected = (numpy.array(ids, dtype=numpy.int32) for ids in (prompt, *answers))
    labels = numpy.concatenate([numpy.full_like(prompt, IGNORED), chosen])
    columns = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    return columns | {"input_ids": numpy.concatenate([prompt, chosen]), "labels": labels}
