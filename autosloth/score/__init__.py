"""A trained model and its base, side by side on a file of questions and answers that neither has learnt."""

from __future__ import annotations

from .compare import score
from .metrics import METRICS

__all__ = ["METRICS", "score"]
