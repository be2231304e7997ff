"""A CPU that answers as a CUDA device would, so that Unsloth takes the classes that it takes on a GPU; Triton's interpreter runs its kernels.

`pretend` comes before torch is imported. What is asked of the device is done on the CPU; its name, capability and memory are those of a real one.
It tells nothing of speed and of CUDA's own kernels. Autocast for a GPU does nothing to what is computed on a CPU.
"""

import contextlib
import os
import types

import cpu_kernels

GIB = 2**30
DEVICES = {  # name, capability, memory
    "T4": ("Tesla T4", (7, 5), 15 * GIB),
    "A100": ("NVIDIA A100-SXM4-40GB", (8, 0), 40 * GIB),
}
ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "TORCHDYNAMO_DISABLE": "1",  # what it compiles is for CUDA
    "UNSLOTH_COMPILE_DISABLE": "1",
    "UNSLOTH_BNB_TRITON": "0",  # Triton's interpreter fails at Unsloth's own 4-bit kernels
    "HF_DEACTIVATE_ASYNC_LOAD": "1",  # other threads do not see that the device is the CPU
    "HF_HUB_OFFLINE": "1",
}
INDEX = "cpu:0"  # the CPU, numbered as a GPU is


class Memory:
    """What the device tells of its memory, in bytes; a test may set it."""

    total = 0
    reserved = 2 * GIB


class Stream:
    """A queue of the device's: all that it is given is done already."""

    cuda_stream = stream_id = 0

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def synchronize(self, *_):
        pass

    wait_stream = wait_event = synchronize

    def record_event(self, event=None):
        return event or Event()


class Event:
    """A mark in such a queue: it is reached already."""

    def __init__(self, *_, **__):
        pass

    def record(self, *_):
        pass

    wait = synchronize = record

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0


class Chosen:
    """torch.cuda.device: there is one."""

    def __init__(self, *_):
        self.idx = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def pretend(device, folder):
    """Be this device from now on; `folder` is for the driver's command."""
    os.environ.update(ENVIRONMENT)
    name, capability, Memory.total = DEVICES[device]
    put_driver(name, folder)
    import bitsandbytes  # which takes its library for a CPU, as long as there is no other device
    import torch
    from triton.backends.nvidia import driver

    driver.libcuda_dirs = list  # else Unsloth runs ldconfig to find them
    driver.CudaDriver.is_active = staticmethod(bool)  # else Triton compiles what talks to it
    cpu_kernels.name_for_cuda(bitsandbytes.functional.lib)
    cpu_kernels.interpret()
    states = bitsandbytes.optim.optimizer
    states.MockArgs = lambda set_to: types.SimpleNamespace(**set_to | {"min_8bit_size": 0})  # tiny layers' too in 8 bit
    torch.version.cuda = "12.8"
    for attribute, answer in answers(name, capability).items():
        setattr(torch.cuda, attribute, answer)
    for attribute in ("get_rng_state", "set_rng_state"):  # a checkpoint keeps the GPU's too
        setattr(torch.cuda.random, attribute, getattr(torch.cuda, attribute))
    torch._C._cuda_getCurrentRawStream = lambda *_: 0  # Unsloth launches its kernels on it
    torch._C._cuda_getDevice = lambda *_: 0
    on_cpu().__enter__()


def put_driver(name, folder):
    """An `nvidia-smi` that names the device: AutoSloth asks it, since that does not load torch."""
    folder.mkdir(parents=True, exist_ok=True)
    command = folder / "nvidia-smi"
    command.write_text(f"#!/bin/sh\necho '{name}, {Memory.total // 2**20}'\n")
    command.chmod(0o755)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


def answers(name, capability):
    """What torch.cuda's functions answer."""
    import torch

    properties = types.SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], total_memory=Memory.total, multi_processor_count=40,
        warp_size=32, max_threads_per_multi_processor=1024, regs_per_multiprocessor=65536,
        shared_memory_per_block_optin=65536, L2_cache_size=4 * 2**20, gcnArchName="", uuid="0",
    )  # fmt: skip
    fixed = {
        "is_available": True, "is_initialized": True, "init": None, "_lazy_init": None,
        "device_count": 1, "current_device": 0, "set_device": None, "can_device_access_peer": False,
        "get_device_name": name, "get_device_capability": capability, "get_device_properties": properties,
        "get_arch_list": [f"sm_{capability[0]}{capability[1]}"],
        "synchronize": None, "ipc_collect": None, "empty_cache": None, "set_stream": None, "is_current_stream_capturing": False,
        "memory_stats": {}, "reset_peak_memory_stats": None,
        # The CPU's generator is the device's too: its seed is set, and its state kept, by itself.
        "manual_seed": None, "manual_seed_all": None, "set_rng_state": None, "set_rng_state_all": None,
        "get_rng_state_all": [],
    }  # fmt: skip
    told = {attribute: (lambda *_, answer=answer, **__: answer) for attribute, answer in fixed.items()}
    told |= dict.fromkeys(("current_stream", "default_stream"), lambda *_, **__: Stream())
    told |= dict.fromkeys(("stream", "device_of"), lambda *_, **__: contextlib.nullcontext())
    used = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    told |= dict.fromkeys(used, lambda *_: Memory.reserved)
    return told | {
        "is_bf16_supported": lambda including_emulation=True: capability >= (8, 0),  # by a name that Unsloth looks for
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "mem_get_info": lambda *_: (Memory.total - Memory.reserved, Memory.total),
        "device": Chosen,
        "Stream": Stream,
        "Event": Event,
    }


def on_cpu():
    """A mode of torch in which a tensor that is sent to the device stays where it is, and one that is made there is made on the CPU."""
    import torch
    from torch.overrides import TorchFunctionMode

    def place(device):
        """A device, or what may stand in its place, as the CPU where it is the GPU."""
        number = isinstance(device, int) and not isinstance(device, bool)
        named = isinstance(device, str) and device.startswith("cuda")
        given = isinstance(device, torch.device) and device.type == "cuda"
        return INDEX if number or named or given else device

    class OnCPU(TorchFunctionMode):
        def __torch_function__(self, function, types, given=(), named=None):
            named, name = dict(named or {}), getattr(function, "__name__", "")
            if name in ("cuda", "pin_memory") and given:  # of a tensor
                return given[0]
            if function is torch.device:
                kind = named.get("type", given[0] if given else "cuda")
                return function(INDEX) if place(kind) == INDEX else function(*given, **named)
            if "device" in named:
                named["device"] = place(named["device"])
            if named.get("pin_memory"):
                del named["pin_memory"]
            if function is torch.Tensor.to and len(given) > 1:
                given = (given[0], place(given[1]), *given[2:])
            return function(*given, **named)

    return OnCPU()
