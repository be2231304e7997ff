"""The adapter is trained, by answers (SFT), by preferences (DPO) or in rounds of self-play (SPIN).

The model is measured on held-out rows before, on the way and after.
"""

from .dpo import train_preferences
from .rounds_table import show_rounds
from .spin import self_play
from .trackers import check_trackers
from .train import train_adapter

__all__ = [
    "check_trackers",
    "self_play",
    "show_rounds",
    "train_adapter",
    "train_preferences",
]
