"""Batch sizes that fit the GPU: out of memory, training goes on with smaller batches and as many rows a step."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from ..distributed import processes
from ..errors import ModelError
from ..output import say


def enough_memory(work: Callable[[], Any]) -> bool:
    """Do some work to its end; False where the GPU's memory is too small for it, and is free again."""
    import torch
    from accelerate.utils.memory import clear_device_cache

    try:
        work()
        return True
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # they hold what filled it
    clear_device_cache(garbage_collection=True)
    return False


def fits(trainer: Any, training: Callable[[], Any]) -> bool:
    """Train to the end; False where the GPU's memory is too small for it, and the trainer can begin anew."""
    if enough_memory(training):
        return True
    forget(trainer)
    return False


def forget(trainer: Any) -> None:
    """Let the trainer keep nothing of the steps that it took, but for the weights."""
    trainer.optimizer, trainer.model_wrapped = None, trainer.model  # both are made anew
    trainer._metrics["train"].clear()  # trl 1.15 would count the broken step's in with the next
    trainer.model.zero_grad()
    if handle := getattr(trainer, "neftune_hook_handle", None):  # transformers 5.17 would add a second noise
        handle.remove()


def evaluated(trainer: Any, evaluate: Callable[[], Any]) -> Any:
    """What `evaluate` finds on the trainer's held-out rows, taken in smaller batches where the GPU's memory is too small.

    Raises ModelError when one row at a time does not fit.
    """
    found: list[Any] = []
    while not without_accumulation(trainer, lambda: enough_memory(lambda: found.append(evaluate()))):
        size = trainer.args.per_device_eval_batch_size
        refuse_to_shrink(size)
        trainer.args.per_device_eval_batch_size = size // 2
        trainer._metrics["eval"].clear()
        say(f"measure: no GPU memory for {size} rows at once; going on with {size // 2}")
    return found[0]


def without_accumulation(trainer: Any, work: Callable[[], Any]) -> Any:
    """Do some work that has no gradients to add up: where the trainer is set to, Unsloth 2026.10 warns that it could not count their tokens."""
    times, trainer.args.gradient_accumulation_steps = trainer.args.gradient_accumulation_steps, 1
    try:
        return work()
    finally:
        trainer.args.gradient_accumulation_steps = times


def take_batches(trainer: Any, size: int) -> None:
    """Let the trainer take so many rows at once, or the next fewer that divide a step's rows, which stay as many as they are."""
    args = trainer.args
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    size = next(fewer for fewer in range(size, 0, -1) if rows % fewer == 0)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = size, rows // size
    trainer._train_batch_size = args.train_batch_size  # transformers 5.17 takes it from there


def batches(trainer: Any) -> dict[str, int]:
    """How the rows of a step came: in how many processes, how often, and how many at once."""
    size, times = trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps
    at_once = {"batch_size": size, "gradient_accumulation": times, "processes": processes()}
    return {**at_once, "rows_per_step": size * times * processes()}


def refuse_to_shrink(size: int) -> None:
    """Raises ModelError where smaller batches are no way out: one row is too much, or other processes wait for this one's batch."""
    what = f"The GPU is out of memory with batch_size {size}."
    if size == 1:
        raise ModelError(what, "Lower `max_length` or `lora_r`, or choose a smaller model, and run again.")
    if processes() > 1:
        todo = "Halve `batch_size` and double `gradient_accumulation` (the result is the same), and run again."
        raise ModelError(what, todo)
