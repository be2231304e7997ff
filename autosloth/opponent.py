"""The opponent's answers: the model as it stands answers the dataset's prompts, sampled, in chunks that survive whatever stops it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from .generate import Decoding, answer, checked
from .live import duration
from .run import fingerprint, read_json, say, write_json

CHUNK = 256  # prompts that are answered, and kept, together


def answers_of(
    folder: Path, model: Any, tokenizer: Any, prompts: list[list[int]], decoding: Decoding, player: str
) -> list[list[int]]:
    """The model's sampled answer to each prompt, up to and with its end token where it came; those that are in the folder already are taken from there.

    A chunk is one file, written whole, seeded by its number: made again after a kill it holds the same. player: what tells this
    model's weights from others; chunks of another player, of other prompts or of another decoding are made anew.
    """
    chunks = [prompts[start : start + CHUNK] for start in range(0, len(prompts), CHUNK)]
    how = [decoding.max_new_tokens, decoding.temperature, decoding.seed]
    keys = [fingerprint([player, number, chunk, how]) for number, chunk in enumerate(chunks)]
    paths = [folder / f"answers-{number:05}.json" for number in range(len(chunks))]
    missing = [n for n, (path, key) in enumerate(zip(paths, keys, strict=True)) if read_json(path).get("key") != key]
    if missing:
        trusted, began, tokens = checked(model, tokenizer, prompts, decoding), time.perf_counter(), 0
        for done, number in enumerate(missing, start=1):
            seeded = trusted.seeded(number)
            made = answer(model, tokenizer, chunks[number], seeded)
            write_json(paths[number], {"key": keys[number], "answers": made})
            tokens, seconds = tokens + sum(map(len, made)), time.perf_counter() - began
            left = duration(seconds / done * (len(missing) - done))
            say(f"generate: {sum(len(chunks[n]) for n in missing[:done])} of {sum(len(chunks[n]) for n in missing)} answers, {tokens / seconds:.0f} tokens per second, about {left} left")  # fmt: skip
    return [ids for path in paths for ids in read_json(path)["answers"]]
