"""Chats become token ids and labels: the text that the model reads, and which of its tokens it learns."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..errors import ModelError
from ..models import opening, render_chat
from ..settings import Settings
from .clean import Findings
from .normalise import Row

IGNORED = -100  # the label that torch's cross-entropy leaves out
BATCH = 1000  # rows that are tokenised at once


def encode_rows(tokenizer: Any, rows: list[Row], settings: Settings, found: Findings) -> list[Row]:
    """Each row with its `text`, `input_ids` and `labels` (IGNORED where nothing is learnt); rows that do not fit are left out and counted.

    Raises ModelError when the chat template refuses every row.
    """
    kept = []
    batches = (render_rows(tokenizer, rows[start : start + BATCH], found) for start in range(0, len(rows), BATCH))
    for rendered, encodings in one_ahead(
        lambda batch: (batch, tokenize(tokenizer, [text for _, text, _ in batch])), batches
    ):
        for (row, text, spans), encoded in zip(rendered, encodings, strict=True):
            if labelled := cut_and_label(encoded, spans, len(text), settings, found):
                kept.append(row | {"text": text} | labelled)
    return kept


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


def render_rows(tokenizer: Any, rows: list[Row], found: Findings) -> list[tuple[Row, str, list[tuple[int, int]]]]:
    """Each row with its text and the spans of it that are learnt; rows that the template does not show whole are left out and counted.

    Raises ModelError when the chat template refuses all of them.
    """
    rendered, refusal, refused = [], None, 0
    for row in rows:
        try:
            text, spans = render_row(tokenizer, row)
        except ModelError as error:
            refusal, refused = error, refused + 1
            continue
        if left_out(tokenizer, row, text):
            found.dropped["turn_left_out_by_template"] += 1
        elif not spans:
            found.dropped["answer_not_found_in_template"] += 1
        else:
            answers = sum(turn["role"] == "assistant" for turn in row["messages"])
            found.answers_not_learnt += max(0, answers - len(spans))
            rendered.append((row, text, spans))
    if refusal and refused == len(rows):
        raise refusal
    found.dropped["refused_by_template"] += refused
    return rendered


def cut_and_label(
    encoded: Any, spans: list[tuple[int, int]], length: int, settings: Settings, found: Findings
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
        found.dropped["answer_beyond_max_length"] += 1
        return None
    if len(ids) > settings.max_length:
        if settings.long_rows == "drop":
            found.dropped["longer_than_max_length"] += 1
            return None
        found.truncated += 1
    return {"input_ids": ids[: settings.max_length], "labels": labels[: settings.max_length]}


def token_from(encoded: Any, character: int, length: int) -> int:
    """The first token that begins at this character of the text or later."""
    for position in range(character, length):
        token = encoded.char_to_token(position)
        if token is not None:
            return token if encoded.token_to_chars(token)[0] >= character else token + 1
    return len(encoded.ids)


def render_row(tokenizer: Any, row: Row) -> tuple[str, list[tuple[int, int]]]:
    """The text of a row as the model reads it, and where in it stands what is learnt, as (start, end) characters. Raises ModelError."""
    if row["messages"]:
        text = render_chat(tokenizer, row["messages"], tools=row.get("tools"))
        return text, answer_spans(tokenizer, row, text)
    begin, text = opening(tokenizer), row["text"]
    if not text.startswith(begin):
        text = begin + text
    if not text.rstrip().endswith(tokenizer.eos_token):
        text += tokenizer.eos_token
    return text, [(len(begin), len(text))]


def answer_spans(tokenizer: Any, row: Row, text: str, first: int = 0) -> list[tuple[int, int]]:
    """Where in the rendered text the assistant's answers from the `first` message on stand, end token included, as (start, end) characters.

    An answer begins where the prompt for it ends, and ends where the chat up to it does. Some templates render an answer
    otherwise once the chat goes on (Qwen3 shows thinking only in the last one): then it ends with what ends the last answer.
    """
    spans, messages, tools = [], row["messages"], row.get("tools")
    final = messages[-1]["content"]
    ending = text[text.rfind(final) + len(final) :].rstrip() if final and final in text else None
    for i, message in enumerate(messages):
        if i < first or message["role"] != "assistant":
            continue
        before = render_chat(tokenizer, messages[:i], answer_next=True, tools=tools)
        upto = text if i == len(messages) - 1 else render_chat(tokenizer, messages[: i + 1], tools=tools)
        if not text.startswith(upto):
            said, shared = message["content"] + (ending or ""), len(os.path.commonprefix([before, text]))
            asked = len(render_chat(tokenizer, messages[:i], tools=tools).rstrip())
            at = text.find(said, shared) if ending and shared >= asked else -1
            if at < 0:
                continue
            upto = text[: at + len(said)]
        begin = len(os.path.commonprefix([before, upto])) if not upto.startswith(before) else len(before)
        # A prompt may end otherwise than the text goes on (with an opened thought, say), but not in what was asked.
        if begin == len(before) or upto.startswith(render_chat(tokenizer, messages[:i], tools=tools).rstrip()):
            spans.append((begin, len(upto.rstrip())))
    return spans


def left_out(tokenizer: Any, row: Row, text: str) -> bool:
    """Whether a chat template dropped a system prompt, a tool's turn, a call or the tools, which many do without a word: without it the text is the same."""
    messages, tools = row["messages"], row.get("tools")
    without = [(messages, None)] if tools else []
    for i, turn in enumerate(messages):
        if turn["role"] in ("system", "tool"):
            without.append((messages[:i] + messages[i + 1 :], tools))
        if "tool_calls" in turn:
            uncalled = {key: value for key, value in turn.items() if key != "tool_calls"}
            without.append(([*messages[:i], uncalled, *messages[i + 1 :]], tools))
    for others, tools in without:
        with contextlib.suppress(ModelError):  # it is needed, so it is not dropped
            if render_chat(tokenizer, others, tools=tools) == text:
                return True
    return False


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
