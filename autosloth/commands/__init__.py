"""What the commands share: settings as options, as a file to begin with; the runs of a folder."""

from __future__ import annotations

from .commented import commented
from .listing import listed, show_runs
from .options import RoadCommand, complete_runs, folder_of_runs, other_defaults_help, with_settings

__all__ = [
    "RoadCommand",
    "commented",
    "complete_runs",
    "folder_of_runs",
    "listed",
    "other_defaults_help",
    "show_runs",
    "with_settings",
]
