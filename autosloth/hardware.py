"""What a run runs on: the GPU as its driver names it, without loading torch; and, for the facts, the machine and the libraries."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from typing import Any, NamedTuple

VERSIONS = ["autosloth", "unsloth", "unsloth_zoo", "trl", "peft", "transformers", "datasets", "torch", "bitsandbytes"]
VERSIONS += ["llama_cpp_python"]


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


def hardware() -> dict[str, Any]:
    """What the run ran on."""
    import psutil
    import torch

    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "gpu": gpu.name if gpu else None,
        "vram_gb": round(gpu.total_memory / 1e9, 1) if gpu else None,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "ram_gb": round(psutil.virtual_memory().total / 1e9, 1),
    }


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that shape the result."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
