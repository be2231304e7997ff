"""A row as the model will see it: what is given to it, and what it learns to say."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from .run import say

IGNORED = -100  # the label that torch's cross-entropy leaves out


def preview(tokenizer: Any, row: dict[str, Any]) -> None:
    """Print one encoded row, its special tokens visible, each stretch marked `given` or `learnt`."""
    learnt = sum(label != IGNORED for label in row["labels"])
    say(f"data: one row of {len(row['input_ids'])} tokens, {learnt} of them learnt:")
    for is_learnt, tokens in groupby(
        zip(row["input_ids"], row["labels"], strict=True), lambda pair: pair[1] != IGNORED
    ):
        text = tokenizer.decode([token for token, _ in tokens], skip_special_tokens=False)
        for line in text.splitlines():
            say(f"  {'learnt' if is_learnt else 'given ':6} | {line}")
