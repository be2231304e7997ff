"""What a notebook shows: the panel of the training, answers before and after, the summary.

Secrets and Google Drive are found here, and notebooks run headless.
"""

from .libraries import install
from .live import Interruption, held_out_losses, progress_callback, show_answers, summary
from .runtime import DRIVE, drive_folder, find_token, front_end_attached, give_token, mount_drive, place

__all__ = [
    "DRIVE",
    "Interruption",
    "drive_folder",
    "find_token",
    "front_end_attached",
    "give_token",
    "held_out_losses",
    "install",
    "mount_drive",
    "place",
    "progress_callback",
    "show_answers",
    "summary",
]
