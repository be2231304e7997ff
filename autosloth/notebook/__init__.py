"""What a notebook shows: the form, the panel of the training, answers before and after, the summary.

Secrets and Google Drive are found here, and notebooks run headless.
"""

from .form import open_form
from .libraries import install
from .live import Interruption, held_out_losses, progress_callback, show_answers, summary
from .runtime import DRIVE, drive_folder, front_end_attached, place
from .widgets import Maker

__all__ = [
    "DRIVE",
    "Interruption",
    "Maker",
    "drive_folder",
    "front_end_attached",
    "held_out_losses",
    "install",
    "open_form",
    "place",
    "progress_callback",
    "show_answers",
    "summary",
]
