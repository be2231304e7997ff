"""Chats become token ids and labels: the text that the model reads, and which of its tokens it learns."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..errors import ModelError
from ..hub_client import first_lines
from ..models import opening
from ..settings import Settings
from .clean import SAID_IN, Findings
from .layout import THOUGHT_END, Layout, Template
from .turns import Row, Turn

IGNORED = -100  # the label that torch's cross-entropy leaves out
BATCH = 200  # rows that are tokenised at once
OWN_THOUGHT = re.compile(r"\A\s*(<think>)?.*?</think>\s*", re.DOTALL)


def encode_rows(
    tokenizer: Any, rows: Iterable[Row], settings: Settings, found: Findings, embeddings: int | None = None
) -> Iterator[Row]:
    """Each row with its `text`, `input_ids` and `labels` (IGNORED where nothing is learnt); rows that do not fit are left out and counted.

    embeddings: for how many ids the model has some, if that is known.
    """
    template = Template(tokenizer)
    batches = (render_rows(template, batch, settings, found) for batch in batches_of(rows))
    for rendered, encodings in one_ahead(
        lambda batch: (batch, tokenize(tokenizer, [text for _, text, _ in batch])), batches
    ):
        for (row, text, spans), encoded in zip(rendered, encodings, strict=True):
            if beyond(encoded.ids, embeddings):
                drop("token_beyond_embeddings", row, found)
            elif labelled := cut_and_label(encoded, spans, len(text), row, settings, found):
                yield row | {"text": text} | labelled


def batches_of(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows, BATCH at a time."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, BATCH)):
        yield batch


def one_ahead(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """work(item) for each in turn, done in a thread while the caller is busy with the one before (tokenizers work without the GIL).

    >>> list(one_ahead(abs, [-1, -2]))
    [1, 2]
    """
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            following = pool.submit(work, item)
            if waiting:
                yield waiting.result()
            waiting = following
        if waiting:
            yield waiting.result()


def render_rows(
    template: Template, rows: list[Row], settings: Settings, found: Findings
) -> list[tuple[Row, str, list[tuple[int, int]]]]:
    """Each row with its text and the spans of it that are learnt; rows that the template refuses or does not show whole are left out and counted."""
    rendered = []
    for row in rows:
        row = without_thoughts(row, template, settings, found)
        try:
            text, spans = render_row(template, row, settings, found)
        except ModelError as error:
            refuse(row, error, found)
            continue
        if isinstance(spans, str):
            drop(spans, row, found)
        else:
            rendered.append((row, text, spans))
    return rendered


def drop(reason: str, row: Row, found: Findings) -> None:
    """Count a row that is left out, and keep the first one as the example; it is not among the changed ones any more."""
    found.dropped[reason] += 1
    found.changed.subtract(row.get("changes", ()))
    found.example(reason, {name: row[name] for name in SAID_IN if name in row})


def refuse(row: Row, error: ModelError, found: Findings) -> None:
    """Count a row that the chat template refuses, by what the template says."""
    drop("refused_by_template", row, found)
    found.refused.add(first_lines(error.__context__ or error), row.get("number", 0))


def note(names: Counter, row: Row, found: Findings) -> None:
    """Count what was changed of a row that is learnt."""
    changes = row.setdefault("changes", [])
    for name in +names:
        changes.append(name)
        found.changed[name] += 1
        found.example(name, {name: row[name] for name in SAID_IN if name in row})


def beyond(ids: list[int], known: int | None) -> bool:
    """Whether an id has no embedding."""
    return known is not None and bool(ids) and max(ids) >= known


def cut_and_label(
    encoded: Any, spans: list[tuple[int, int]], length: int, row: Row, settings: Settings, found: Findings
) -> Row | None:
    """`input_ids` and `labels` of a row as int32 (tokens,), cut at max_length; None, counted, for a row that is to be dropped."""
    import numpy

    ids = numpy.array(encoded.ids, dtype=numpy.int32)
    labels = numpy.full_like(ids, IGNORED)
    for begin, end in spans:
        first, last = token_from(encoded, begin, length), token_from(encoded, end, length)
        labels[first:last] = ids[first:last]
    found.lengths.append(len(ids))
    if (labels[: settings.max_length] == IGNORED).all():
        return drop("answer_beyond_max_length", row, found)
    if len(ids) > settings.max_length:
        if settings.long_rows == "drop":
            return drop("longer_than_max_length", row, found)
        found.truncated += 1
        found.cut_tokens += len(ids) - settings.max_length
    return {"input_ids": ids[: settings.max_length], "labels": labels[: settings.max_length]}


def token_from(encoded: Any, character: int, length: int) -> int:
    """The first token that begins at this character of the text or later."""
    for position in range(character, length):
        token = encoded.char_to_token(position)
        if token is not None:
            return token if encoded.token_to_chars(token)[0] >= character else token + 1
    return len(encoded.ids)


def render_row(
    template: Template, row: Row, settings: Settings, found: Findings
) -> tuple[str, list[tuple[int, int]] | str]:
    """The text of a row as the model reads it, and where in it stands what is learnt, as (start, end) characters; or why the row cannot be used. Raises ModelError."""
    if not row["messages"]:
        found.noted["special_tokens_in_a_text"] += bool(template.special.search(row["text"]))
        return render_text(template.tokenizer, row["text"])
    placed = template.place(row["messages"], row.get("tools"))
    if placed.layout.hidden:
        return placed.text, "turn_left_out_by_template"
    masked = {i for i, turn in enumerate(row["messages"]) if "weight" in turn}
    spans = [(start, end) for turn, start, end in placed.answers if turn not in masked]
    if not spans:
        return placed.text, "answer_not_found_in_template"
    last = len(row["messages"]) - 1
    if last not in masked and placed.answers[-1][0] != last:
        return placed.text, "last_answer_not_shown_whole_by_template"
    note(changes(placed.layout), row, found)
    found.answers_not_learnt += placed.layout.not_learnt
    found.noted["answers_marked_not_to_learn"] += len(masked)
    found.noted["answers_behind_another_opening"] += placed.layout.other_opening
    found.noted["special_tokens_in_a_text"] += has_special(template, row["messages"])
    note_thoughts(row["messages"], placed.layout, settings, found)
    return placed.text, spans


def render_text(tokenizer: Any, text: str) -> tuple[str, list[tuple[int, int]]]:
    """Plain text with one begin and one end, learnt whole."""
    begin = opening(tokenizer)
    if not text.startswith(begin):
        text = begin + text
    if not text.rstrip().endswith(tokenizer.eos_token):
        text += tokenizer.eos_token
    return text, [(len(begin), len(text))]


def changes(layout: Layout) -> Counter:
    """What is learnt otherwise than it stands, by how the template shows a chat of this layout."""
    return Counter(
        {
            "answer_put_behind_the_prompt": layout.rebuilt and not layout.closed,
            "opened_thought_closed_before_the_answer": layout.closed,
            "thought_left_out_by_template": layout.thought_hidden,
            "first_blanks_cut_by_template": layout.blanks_hidden,
        }
    )


def without_thoughts(row: Row, template: Template, settings: Settings, found: Findings) -> Row:
    """The row without its thoughts where `thinking` is off and the template has that switch: its prompts say that there are none."""
    if settings.thinking or "enable_thinking" not in template.tokenizer.chat_template:
        return row
    changed = {name: [thoughtless(turn) for turn in row[name]] for name in ("messages", "prompt", "chosen", "rejected") if name in row}  # fmt: skip
    if all(row[name] == turns for name, turns in changed.items()):
        return row
    note(Counter(thought_left_out_as_thinking_is_off=1), row, found)
    return row | changed


def note_thoughts(turns: list[Turn], layout: Layout, settings: Settings, found: Findings) -> None:
    """Count a row whose thoughts are learnt though `thinking` is off: its chat template has no switch, so what stands there is shown."""
    found.noted["thoughts_learnt_as_the_template_has_no_switch"] += not settings.thinking and not layout.thought_hidden and any(map(thinks, turns))  # fmt: skip


def thinks(turn: Turn) -> bool:
    """Whether an answer comes with a thought."""
    return turn["role"] == "assistant" and ("reasoning_content" in turn or THOUGHT_END in turn["content"])


def thoughtless(turn: Turn) -> Turn:
    """An answer without its thought; others as they are.

    >>> thoughtless({"role": "assistant", "content": "<think>2 and 2</think> Four."})
    {'role': 'assistant', 'content': 'Four.'}
    """
    if turn["role"] != "assistant":
        return turn
    said = OWN_THOUGHT.sub("", turn["content"], count=1) if THOUGHT_END in turn["content"] else turn["content"]
    return {key: value for key, value in turn.items() if key != "reasoning_content"} | {"content": said}


def has_special(template: Template, turns: list[Turn]) -> bool:
    """Whether a text of a chat holds one of the tokenizer's special tokens, which the model reads as such."""
    return any(template.special.search(turn["content"]) for turn in turns)


def tokenize(tokenizer: Any, texts: list[str]) -> list[Any]:
    """The texts as `tokenizers.Encoding`s, special tokens as they stand in the text, on all cores.

    The tokenizer's own call makes lists of masks and offsets that nobody reads: twice the time (transformers 5.17).
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    with parallel_tokenizers():
        return backend.encode_batch(texts, add_special_tokens=False)


@contextlib.contextmanager
def parallel_tokenizers() -> Iterator[None]:
    """Let `tokenizers` use all cores in the block; Unsloth switches that off for the sake of processes forked later."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before or "false"
