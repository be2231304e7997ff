"""The roads: which stages each has, and in which order. The commands follow them here; the notebooks' cells call the same ones."""

from __future__ import annotations

from collections.abc import Callable

from .check import check
from .data import prepare_data, show_preview
from .distributed import first
from .export import compile_llama_cpp, write_gguf, write_merged
from .notebook import show_answers, summary
from .output import say
from .proof import verify_gguf
from .publish import publish, publish_adapter, write_card
from .run import Run
from .settings import Settings
from .training import self_play, show_rounds, train_adapter, train_preferences

Stage = Callable[[Run], None]
TRAINING: dict[str, list[Stage]] = {
    "sft": [train_adapter, show_answers],
    "dpo": [train_preferences, show_answers],
    "spin": [self_play, show_rounds, show_answers],
}
EXPORT: list[Stage] = [write_merged, write_gguf]


def stages(road: str) -> list[Stage]:
    """A road, stage by stage."""
    return [prepare_data, show_preview, *TRAINING[road], publish_adapter, *EXPORT, verify_gguf, write_card, publish]


def follow(settings: Settings) -> None:
    """The whole road of these settings; of several processes the others take part in the training alone."""
    for reason in settings.reasons():
        say(reason)
    if first():
        check(settings)
    run = Run.create(settings)
    if first() and settings.quantizations:
        compile_llama_cpp()
    for stage in stages(settings.road):
        if first() or getattr(stage, "together", False):
            stage(run)
    if first():
        summary(run)
