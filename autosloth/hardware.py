"""The GPU as its driver names it, without loading torch."""

from __future__ import annotations

import subprocess
from typing import NamedTuple


class GPU(NamedTuple):
    """An NVIDIA GPU: its name, and its memory in GB."""

    name: str
    memory_gb: float


def first_gpu() -> GPU | None:
    """The first NVIDIA GPU; None where there is none or its driver does not answer."""
    asked = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(asked, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    name, _, mebibytes = (result.stdout.splitlines() or [""])[0].rpartition(", ")
    if result.returncode or not mebibytes.strip().isdigit():
        return None
    return GPU(name, int(mebibytes) * 2**20 / 1e9)
