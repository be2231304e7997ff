"""What was said with one model, what of it fits into its context, and a file of it that can be trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import DataError, StorageError
from ..output import counted
from ..run import storage_errors, write_bytes
from .speaker import ROOM, Said, Sampling, Speaker


@dataclass
class Conversation:
    """Questions and answers so far, and the system prompt. turns: `messages` without the system prompt, questions and answers in turn."""

    speaker: Speaker
    sampling: Sampling
    system: str = ""
    turns: list[dict[str, Any]] = field(default_factory=list)
    saved: dict[Path, str] = field(
        default_factory=dict
    )  # the row of this conversation in each file that it was saved in

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

    def save(self, path: Path) -> int:
        """Add the conversation to a JSONL file of `messages`, whole or not at all; its own row, saved before, gives way, and all others stay byte for byte. Returns how many rows are in it.

        Raises StorageError where the file cannot be written, or is something else.
        """
        with storage_errors(path):
            path = path.resolve()  # a link stays one
            if path.is_dir() or not path.parent.is_dir():
                raise StorageError(f"{path if path.is_dir() else path.parent} is {'a' if path.is_dir() else 'no'} folder.", "Give the name of a file in a folder that is there.")  # fmt: skip
            text = path.read_bytes() if path.exists() else b""
        rows = [row for row in text.split(b"\n") if row.strip()]
        if not all(map(is_conversation, rows)):
            raise StorageError(
                f"{path} is there already, and is no file of conversations.",
                "Give the name of another file, such as /save other.jsonl.",
            )
        row = json.dumps({"messages": self.messages}, ensure_ascii=False)
        for separator in "\u2028\u2029\x85":  # which some take for the end of a line
            row = row.replace(separator, f"\\u{ord(separator):04x}")
        own = self.saved.get(path, "").encode()
        rows = [*(other for other in rows if other != own), row.encode()]
        with storage_errors(path):
            write_bytes(path, b"\n".join(rows) + b"\n")
        self.saved[path] = row
        return len(rows)

    def forget(self) -> None:
        """Begin anew; what was saved stays."""
        self.turns, self.saved = [], {}


def is_conversation(row: bytes) -> bool:
    """Whether a line of a file holds `messages`."""
    try:
        return isinstance(json.loads(row.decode("utf-8"))["messages"], list)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
