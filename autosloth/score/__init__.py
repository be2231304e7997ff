"""A trained model and its base, side by side on a file of questions and answers that neither has learnt."""

from __future__ import annotations

from .bootstrap import CONFIDENCE, FEW, RESAMPLES, intervals
from .compare import listed, score
from .harness import asked, named, score_tasks
from .metrics import IN_WORDS, METRICS, NotScored

__all__ = [
    "CONFIDENCE",
    "FEW",
    "IN_WORDS",
    "METRICS",
    "RESAMPLES",
    "NotScored",
    "asked",
    "intervals",
    "listed",
    "named",
    "score",
    "score_tasks",
]
