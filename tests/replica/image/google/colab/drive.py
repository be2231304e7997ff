"""Google Drive: a folder, mounted at once."""

from pathlib import Path


def mount(place):
    Path(place, "MyDrive").mkdir(parents=True, exist_ok=True)
