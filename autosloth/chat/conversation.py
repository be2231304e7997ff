"""What was said with one model, what of it fits into its context, and a file of it that can be trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import DataError, StorageError
from ..output import counted
from ..run import storage_errors, write_text
from .speaker import ROOM, Said, Sampling, Speaker


@dataclass
class Conversation:
    """Questions and answers so far, and the system prompt. turns: `messages` without the system prompt, questions and answers in turn."""

    speaker: Speaker
    sampling: Sampling
    system: str = ""
    turns: list[dict[str, Any]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All of it, as `dataset` takes it: an answer that was cut short is there and has the weight 0, so that it is not learnt."""
        return self.with_system(self.turns)

    def with_system(self, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """These turns behind the system prompt, if there is one."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *turns]

    def ask(self, question: str, tell: Said, note: Said, stopped: Callable[[], bool] = lambda: False) -> str:
        """The answer, which `tell` hears as it comes; `note` hears what was left out or cut short. Raises DataError for a question that is too long, ModelError."""
        turns = [*self.turns, {"role": "user", "content": question}]
        prompt, left_out = self.fitting(turns)
        if left_out:
            note(
                f"the context of {self.speaker.context} tokens is full: the first {counted(left_out, 'turn')} left out"
            )
        sampling = replace(self.sampling, seed=self.sampling.seed + len(self.turns))
        answer, cut = self.speaker.answer(prompt, sampling, tell, stopped)
        if cut:
            note(f"the answer is cut short: {cut}")
        self.turns = [*turns, {"role": "assistant", "content": answer} | ({"weight": 0} if cut else {})]
        return answer

    def fitting(self, turns: list[dict[str, Any]]) -> tuple[list[int], int]:
        """The prompt, with the oldest questions and answers left out as far as it takes, and the number of turns left out. Raises DataError, ModelError."""
        most = int(self.speaker.context * (1 - ROOM))
        for left_out in range(0, len(turns), 2):
            prompt = self.speaker.prompt(self.with_system(turns[left_out:]))
            if len(prompt) <= most:
                return prompt, left_out
        raise DataError(
            f"The question is too long: {len(prompt)} tokens with all that stands around it, of {most} that fit.",
            f"Ask in fewer words; {self.speaker.context - most} of {self.speaker.context} tokens are kept for the answer.",
        )


def save(messages: list[dict[str, Any]], path: Path) -> int:
    """Add a conversation to a JSONL file of `messages`, whole or not at all; one that it goes on from gives way. Returns how many are in it. Raises StorageError."""
    with storage_errors(path):
        text = path.read_bytes().decode("utf-8", errors="replace") if path.exists() else ""
    try:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        rows = [row for row in rows if row["messages"] != messages[: len(row["messages"])]]
    except (ValueError, TypeError, KeyError):
        raise StorageError(
            f"{path} is there already, and is no file of conversations.",
            "Give the name of another file, such as /save other.jsonl.",
        ) from None
    rows.append({"messages": messages})
    with storage_errors(path):
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows)
