"""What the GPU draws is counted by its own counter, over resumes too, and said where it is counted and nowhere else."""

import sys
from types import SimpleNamespace

import pytest

from autosloth.hardware import gpu_energy_wh
from autosloth.notebook.live import energy_since


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch):
    """A stand-in for nvidia-ml-py on a machine with one GPU; set `millijoules` to what its counter shows, or to None where it has none."""
    import torch

    def total(handle):
        if handle != "handle of GPU-1234" or module.millijoules is None:
            raise NVMLError("Not Supported")
        return module.millijoules

    module = SimpleNamespace(NVMLError=NVMLError, nvmlInit=lambda: None, millijoules=0)
    module.nvmlDeviceGetHandleByUUID = "handle of {}".format
    module.nvmlDeviceGetTotalEnergyConsumption = total
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    return module


def test_a_training_and_its_resumption_are_counted_together(nvml):
    nvml.millijoules = 36_000_000
    spent = energy_since([])
    nvml.millijoules += 7_200_000
    assert spent() == 2.0
    nvml.millijoules += 3_600_000_000  # of others, while it stood still
    spent = energy_since([{"seconds": 1.0, "energy_wh": 2.0}, {"train_loss": 1.0}])
    nvml.millijoules += 1_800_000
    assert spent() == 2.5


def test_without_a_counter_or_where_a_part_was_not_counted_there_is_no_figure(nvml):
    assert energy_since([{"seconds": 1.0}])() is None
    nvml.millijoules = None
    assert gpu_energy_wh() is None and energy_since([])() is None


def test_without_the_library_or_a_gpu_there_is_no_figure(nvml, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_energy_wh() is None
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_energy_wh() is None


def test_of_several_gpus_none_is_counted_for_all(nvml, monkeypatch):
    monkeypatch.setattr("autosloth.notebook.live.processes", lambda: 2)
    assert energy_since([])() is None
