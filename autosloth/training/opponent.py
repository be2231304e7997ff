"""The opponent's answers: the model as it stands answers the dataset's prompts, sampled, in chunks that survive an interruption."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..data import IGNORED
from ..distributed import number, processes, wait_for_all
from ..models import Decoding, answer, checked
from ..output import duration, say
from ..run import fingerprint, read_json, write_json

CHUNK = 512  # prompts that are answered, and kept, together
SAY_EVERY = 30  # seconds
LEFT_OUT = {"too_long": "without an end", "empty": "empty", "equal": "equal to the dataset's answer"}


def answers_of(
    folder: Path,
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    decoding: Decoding,
    player: str,
    after_chunk: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """The model's sampled answer to each prompt, up to and with its end token where it came; those that are in the folder already are taken from there.

    A chunk is one file, written whole, seeded by its number: made again after a kill it holds the same. player: what tells this
    model's weights from others; chunks of another player, of other prompts or of another decoding are made anew. Of several
    processes each makes every n-th chunk, and all wait for the others' before they read them. after_chunk: called when one is written.
    """
    chunks = [prompts[start : start + CHUNK] for start in range(0, len(prompts), CHUNK)]
    how = [decoding.max_new_tokens, decoding.temperature, decoding.seed]
    keys = [fingerprint([player, n, chunk, how]) for n, chunk in enumerate(chunks)]
    paths = [folder / f"answers-{n:05}.json" for n in range(len(chunks))]
    mine = range(number(), len(chunks), processes())
    missing = [n for n in mine if read_json(paths[n]).get("key") != keys[n]]
    if missing:
        trusted = checked(model, tokenizer, prompts, decoding)
        progress = Progress(sum(len(chunks[n]) for n in missing))
        for n in missing:
            made = answer(model, tokenizer, chunks[n], trusted.seeded(n), progress.tell)
            write_json(paths[n], {"key": keys[n], "answers": made})
            after_chunk()
    wait_for_all()
    return [ids for path in paths for ids in read_json(path)["answers"]]


class Progress:
    """How far the answers are, said now and then and at the end."""

    def __init__(self, total: int):
        self.total, self.answers, self.tokens = total, 0, 0
        self.began = self.said = time.perf_counter()

    def tell(self, ids: list[int]) -> None:
        """One more answer."""
        now, self.answers, self.tokens = time.perf_counter(), self.answers + 1, self.tokens + len(ids)
        if now - self.said < SAY_EVERY and self.answers < self.total:
            return
        seconds, self.said = now - self.began, now
        left = "" if self.answers == self.total else f", about {duration(seconds / self.answers * (self.total - self.answers))} left"  # fmt: skip
        say(f"generate: {self.answers} of {self.total} answers, {self.tokens / seconds:.0f} tokens per second{left}")


def questions(rows: Any, ends: list[int]) -> list[dict[str, Any]]:
    """The rows as {"prompt_ids", "chosen_ids"}: all up to the last answer, and that answer; rows whose answer was cut are left out."""
    found = []
    for row in rows:
        learnt = [place for place, label in enumerate(row["labels"]) if label != IGNORED]
        first = next(p for p in reversed(learnt) if p - 1 not in learnt)  # of the last stretch
        ids = row["input_ids"]
        if row["messages"] and ids[learnt[-1]] in ends:
            found.append({"prompt_ids": ids[:first], "chosen_ids": ids[first : learnt[-1] + 1]})
    return found


def pair_up(
    rows: list[dict[str, Any]], answers: list[list[int]], ends: list[int]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows with the opponent's answers as `rejected_ids`, and how many were left out, by reason.

    An answer that hit the length cap has no end; given one, it would be told apart by that alone.

    >>> row = {"prompt_ids": [5], "chosen_ids": [6, 2]}
    >>> pair_up([row] * 4, [[7, 2], [7, 7], [2], [6, 2]], [2])[1]
    {'too_long': 1, 'empty': 1, 'equal': 1}
    """
    pairs, left_out = [], Counter()
    for row, ids in zip(rows, answers, strict=True):
        reason = "too_long" if ids[-1] not in ends else "empty" if len(ids) == 1 else "equal" if ids == row["chosen_ids"] else None  # fmt: skip
        if reason:
            left_out[reason] += 1
        else:
            pairs.append({**row, "rejected_ids": ids})
    return pairs, dict(left_out)


def listed(left_out: dict[str, int]) -> str:
    """How many answers were left out of the pairs, and why, in words.

    >>> listed({"equal": 25, "too_long": 2}), listed({})
    ("27 answers left out (25 equal to the dataset's answer, 2 without an end)", 'no answer left out')
    """
    if not left_out:
        return "no answer left out"
    reasons = ", ".join(f"{count} {LEFT_OUT[reason]}" for reason, count in left_out.items())
    return f"{sum(left_out.values())} answers left out ({reasons})"
