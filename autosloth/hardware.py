"""What a run runs on: the GPU as its driver names it, without loading torch; memory used; the machine and library versions, for the facts."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from typing import Any, NamedTuple

GB = 1e9  # bytes
MJ_PER_WH = 3.6e6  # millijoules, which NVML counts
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
    return GPU(name, int(mebibytes) * 2**20 / GB)


def gpu_name() -> str | None:
    """The first NVIDIA GPU and its memory in words; None where there is none."""
    gpu = first_gpu()
    return f"{gpu.name} with {gpu.memory_gb:.1f} GB" if gpu else None


def peak_ram_gb() -> float:
    """The most memory that this process ever held, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GB, 2)


def peak_vram_gb() -> float | None:
    """The most GPU memory that torch reserved, in GB; None without a GPU."""
    import torch

    return round(torch.cuda.max_memory_reserved() / GB, 2) if torch.cuda.is_available() else None


def gpu_energy_wh() -> float | None:
    """What the GPU in use has drawn since its driver was loaded, in watt-hours, by NVML's own counter; None where it has none (older than Volta, a part of a GPU) or no library reads it."""
    import torch

    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None) if torch.cuda.is_available() else None
    try:
        import pynvml
    except ImportError:
        return None
    if uuid is None:
        return None
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")) / MJ_PER_WH
    except pynvml.NVMLError:
        return None


def hardware() -> dict[str, Any]:
    """What the run ran on."""
    import psutil
    import torch

    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "gpu": gpu.name if gpu else None,
        "vram_gb": round(gpu.total_memory / GB, 1) if gpu else None,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "ram_gb": round(psutil.virtual_memory().total / GB, 1),
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
