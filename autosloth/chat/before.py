"""The model as it was before the training: asked where its GGUF can be made and fits into memory, else the answers of it that the run kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import AutoSlothError, ModelError
from ..export import gguf_before
from ..hardware import GB
from ..models import model_source
from ..run import Run
from .conversation import Conversation
from .speaker import Said, Sampling, Speaker

SPARE = 1.1  # times its size that a model takes in memory


@dataclass
class Kept:
    """In place of a model that cannot be asked: its answers by question, and why it cannot."""

    answers: dict[str, str]
    why: str

    def ask(self, question: str, tell: Said, note: Said, stopped: Callable[[], bool]) -> str:
        """The kept answer, as such, if this was asked; else `note` hears that there is none."""
        if question not in self.answers:
            note(f"The model before the training cannot be asked here. {self.why}")
            return ""
        tell(self.answers[question])
        note(f"This is the answer that the run kept: the model itself cannot be asked here. {self.why}")
        return self.answers[question]


def before(run: Run, file: Path, sampling: Sampling, system: str = "") -> Conversation | Kept:
    """A conversation with the model as it was before the training, in the same type as `file`; its GGUF is made once and kept in the cache."""
    kept = run.facts.get("eval", {}).get("before", {}).get("samples", [])
    try:
        refuse_small_memory(file)
        kind = run.facts["export"]["gguf"][0]["type"].lower()
        return Conversation(Speaker.of(run, gguf_before(run, kind)), sampling, system)
    except AutoSlothError as error:
        return Kept({sample["question"]: sample["answer"] for sample in kept}, f"{error.what} {error.todo}")


def refuse_small_memory(file: Path) -> None:
    """Raises ModelError where a second model of this size does not fit into memory beside the first."""
    import psutil

    free, size = psutil.virtual_memory().available / GB, file.stat().st_size / GB
    if 2 * size * SPARE > free:
        raise ModelError(
            f"Two models of {size:.1f} GB do not fit into memory, of which {free:.1f} GB are free.",
            "Ask on a machine with more, or a smaller type.",
        )


def at_hand(run: Run, file: Path) -> bool:
    """Whether the base can be asked without a download: it lies here in 16 bits, and both models fit into memory."""
    with contextlib.suppress(ModelError):
        refuse_small_memory(file)
        return run.settings.sixteen_bit_model is None and Path(model_source(run.settings)).is_dir()
    return False
