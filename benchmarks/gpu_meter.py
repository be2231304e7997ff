"""What a training takes on a GPU, for the sides of `gpu.py`: time by step, tokens by batch, losses, memory."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from contextlib import nullcontext, suppress
from typing import Any

from sides import Case

WARMUP_STEPS = 2  # not timed: what is compiled, is compiled in them
PROFILED, TOP = 2, 12


def on_gpu() -> bool:
    """Whether there is a GPU that torch can use."""
    import torch

    return torch.cuda.is_available()


class Meter:
    """Counts what a trainer's batches hold, times its steps, and keeps its losses."""

    def __init__(self, trainer: Any, profiled: bool = False):
        from transformers import TrainerCallback

        self.trainer, self.collate, self.batches, self.ends = trainer, trainer.data_collator, [], []
        self.profile = Profile() if profiled else None
        meter = self

        class Clock(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                meter.step_ended()

        trainer.data_collator = self.collated
        trainer.add_callback(Clock())

    def collated(self, rows: list[Case]) -> Case:
        """A batch: its tokens, the places that it fills, and what tells it from others."""
        batch = self.collate(rows)
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        unpadded = (ids if mask is None else ids[mask.bool()]).flatten().tolist()
        self.batches.append(
            [len(unpadded), ids.numel(), hashlib.sha256(json.dumps(unpadded).encode()).hexdigest()[:12]]
        )
        return batch

    def step_ended(self) -> None:
        import torch

        if on_gpu():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        if self.profile:
            self.profile.profiler.step()

    def train(self) -> Case:
        """Train, and tell."""
        with self.profile.profiler if self.profile else nullcontext():
            self.trainer.train()
        times = [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)][WARMUP_STEPS - 1 :]
        a_step = self.trainer.args.gradient_accumulation_steps
        trained = self.batches[: a_step * len(self.ends)]
        timed = trained[-a_step * len(times) :]
        losses = [float(entry["loss"]) for entry in self.trainer.state.log_history if "loss" in entry]
        rows = a_step * self.trainer.args.per_device_train_batch_size * len(times)
        return {
            "step_s": statistics.median(times),
            "steps_s": times,
            "tokens_per_second": sum(tokens for tokens, *_ in timed) / sum(times),
            "rows_per_second": rows / sum(times),
            "padding": 1 - sum(tokens for tokens, *_ in trained) / sum(places for _, places, _ in trained),
            "losses": losses,
            "batches": [name for *_, name in trained],
            **({"profile": self.profile.told(statistics.median(times))} if self.profile else {}),
            **memory(),
        }


class Profile:
    """Where the time of a step goes, by torch's profiler, which slows it: PROFILED steps after those that compile."""

    def __init__(self) -> None:
        from torch.profiler import ProfilerActivity, profile, schedule

        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu() else [])]
        self.rows: list[Any] = []
        self.profiler = profile(
            activities=kinds,
            schedule=schedule(wait=WARMUP_STEPS, warmup=1, active=PROFILED, repeat=1),
            on_trace_ready=lambda profiler: self.rows.extend(profiler.key_averages()),
        )

    def told(self, step_s: float) -> Case:
        """Seconds of a step that the host and the GPU work, and the TOP of what they do, [name, seconds, calls], by its own time."""
        told = {}
        for where in ("cpu", "device"):
            spent = {row.key: (getattr(row, f"self_{where}_time_total") / 1e6 / PROFILED, row.count // PROFILED) for row in self.rows if not row.key.startswith("ProfilerStep")}  # fmt: skip
            most = sorted(spent.items(), key=lambda item: -item[1][0])[:TOP]
            told[where] = {"busy_s": sum(s for s, _ in spent.values()), "top": [[name[:80], *each] for name, each in most if each[0]]}  # fmt: skip
        return {"step_s": step_s, **told}


def memory() -> Case:
    """The most GPU memory in GB: that torch reserved, that tensors filled, and with what torch does not count (the context)."""
    import torch

    if not on_gpu():
        return {"peak_vram_gb": None}
    uncounted = held_by_driver() - torch.cuda.memory_reserved()
    peak = torch.cuda.max_memory_reserved()
    return {"peak_vram_gb": (peak + uncounted) / 1e9, "reserved_gb": peak / 1e9, "allocated_gb": torch.cuda.max_memory_allocated() / 1e9}  # fmt: skip


def held_by_driver() -> int:
    """The bytes of the GPU that this process holds, as its driver counts them; where it does not tell, all that are not free."""
    import torch

    held = {}
    with suppress(ImportError):
        import pynvml

        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            gpu = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
            held = {process.pid: process.usedGpuMemory for process in pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)}
    free, total = torch.cuda.mem_get_info()
    return held.get(os.getpid()) or total - free


def same_start(model: Any) -> None:
    """Give LoRA weights of the same value to every side: A by its name, B zero."""
    import torch

    for name, parameter in sorted(model.named_parameters()):
        if ".lora_A." in name:
            place = name[name.index("layers.") :].encode()
            generator = torch.Generator().manual_seed(int(hashlib.sha256(place).hexdigest()[:8], 16))
            values = torch.rand(parameter.shape, generator=generator) * 2 - 1
            with torch.no_grad():
                parameter.copy_(values / parameter.shape[1] ** 0.5)
