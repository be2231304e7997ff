"""The first two minutes of a training on a GPU: what would fail late is tried early, and how many rows go at once is found out.

Steps on the longest rows tell what memory they take; a checkpoint is written and read back; a few tokens are generated in a batch and one by
one; the adapter of that moment is placed in a GGUF without weights, whose tokens are compared. All is left as it was before.

The plan for a T4, a 7B in 4 bit and 8 rows a step of 2,048 tokens each, reckoned and not measured: twelve rows in four steps, each of 0.9e14
operations (2 a weight and token, arXiv 2001.08361, section 2.1: forward, once more, back to the adapter), at a third of 65e12 a second 50 s; 30 s
in which kernels are compiled that the training needs anyway; 144 times the next token, 15 s; the head of a GGUF, 10 s.
"""

from __future__ import annotations

import contextlib
import functools
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..distributed import processes
from ..errors import AutoSlothError, ModelError, StorageError, VerifyError
from ..export import adapter_alone, compiled, head_of
from ..hardware import GB
from ..models import Decoding, checked, compute_blocks_again, save_tokenizer
from ..output import counted, say
from ..proof import refuse_other_tokens
from ..run import HALF_WRITTEN, Run
from ..settings import Settings
from .batches import batches, fits, forget, refuse_to_shrink, take_batches
from .checkpoints import numbered, trainable
from .measure import ANSWERS_AT_ONCE, diverged

ROOM = 0.85  # of the GPU's memory up to which the longest rows may take it: between other rows it is left in smaller pieces
OTHERWISE = {
    "save_steps": 1,
    "warmup_steps": 0,
    "lr_scheduler_type": "constant",
}  # than in the training, so that a step moves the weights
TEXTS = 8  # held-out rows whose tokens are compared, besides texts of every kind


class Fit(NamedTuple):
    """How a step's rows go through the model: so many at once, blocks computed again or not, and the peak of GPU memory in GB that the longest took."""

    rows: int
    again: bool
    gb: float


def is_due(run: Run) -> bool:
    """Whether the run has one GPU, and was not tried on one of its kind; several processes could not agree on a batch."""
    import torch

    run.record("trial")  # empty where there is none
    here = torch.cuda.is_available() and processes() == 1
    return here and run.facts["trial"].get("gpu") != torch.cuda.get_device_name()


def try_out(run: Run, trainer: Any, tokenizer: Any) -> list[Any]:
    """Try on this hardware what training and export need; say in three lines what came of it, keep it in the facts, and set the trainer's batches by it.

    Returns the callbacks with which the training has to go on: one where something waits for llama.cpp.

    Raises ModelError where one row does not fit or its loss is no number, StorageError where a checkpoint does not hold the adapter,
    ExportError and VerifyError where the model would become no GGUF, or one with other tokens.
    """
    import torch

    started, later = time.perf_counter(), []
    adapter = tempfile.TemporaryDirectory(prefix="autosloth-")
    with (
        left_as_it_was(trainer),
        tempfile.TemporaryDirectory(dir=run.folder, prefix=".trial-", suffix=HALF_WRITTEN) as temporary,
    ):
        trainer.args.output_dir = temporary
        fit = choose_batch(trainer, run.settings, longest_first(trainer.train_dataset, run.settings.rows_per_step))
        at_once = answers_at_once(run, trainer.model, tokenizer)
        same = "are" if at_once > 1 else "are not"
        say(f"trial: a checkpoint was written and read back; answers in a batch {same} those of single prompts")
        trainer.model.save_pretrained(adapter.name)
    save_tokenizer(tokenizer, run.settings, Path(adapter.name))
    found = convert(run, later, tokenizer, adapter)
    say(f"trial: {found} ({time.perf_counter() - started:.0f} s in all)")
    set_checkpointing(trainer, fit.again)
    take_batches(trainer, fit.rows)
    trainer.args.per_device_eval_batch_size = fit.rows
    run.record(
        "trial", gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None, batch_size=fit.rows, gradient_checkpointing=fit.again,
        longest_gb=round(fit.gb, 2), answers_at_once=at_once, seconds=round(time.perf_counter() - started, 1),
    )  # fmt: skip
    run.record("train", **batches(trainer))
    return later


@contextlib.contextmanager
def left_as_it_was(trainer: Any) -> Iterator[None]:
    """Let a trainer take steps that leave no trace: weights, arguments, rows, callbacks and what is drawn by chance are as before."""
    import numpy
    import torch
    from transformers import DefaultFlowCallback
    from transformers.utils import logging

    args, handler = trainer.args, trainer.callback_handler
    weights = {name: weight.detach().to("cpu", copy=True) for name, weight in trainable(trainer.model)}
    kept, rows, callbacks, state = dict(vars(args)), trainer.train_dataset, handler.callbacks, trainer.state
    drawn = random.getstate(), numpy.random.get_state(), torch.get_rng_state(), torch.cuda.get_rng_state_all()
    seen = trainer._total_train_tokens  # by trl 1.15
    scaler, said = trainer.accelerator.scaler, logging.get_verbosity()  # of losses in fp16, smaller after an overflow
    scale = scaler.state_dict() if scaler else {}
    logging.set_verbosity_error()  # it would tell that the batches are others
    vars(args).update(OTHERWISE)
    handler.callbacks = [each for each in callbacks if isinstance(each, DefaultFlowCallback)]
    try:
        yield
    finally:
        logging.set_verbosity(said)
        forget(trainer)
        trainer.accelerator.free_memory()
        handler.optimizer = handler.lr_scheduler = trainer.lr_scheduler = None
        vars(args).clear()
        vars(args).update(kept)
        trainer.train_dataset, handler.callbacks, trainer.state = rows, callbacks, state
        trainer._train_batch_size, trainer._total_train_tokens = args.train_batch_size, seen
        random.setstate(drawn[0])
        numpy.random.set_state(drawn[1])
        torch.set_rng_state(drawn[2])
        torch.cuda.set_rng_state_all(drawn[3])
        if scale:
            scaler.load_state_dict(scale)
        with torch.no_grad():
            for name, weight in trainable(trainer.model):
                weight.copy_(weights[name])


def longest_first(rows: Any, count: int) -> Any:
    """So many of the trainer's rows, the longest: packed rows, and pairs by their longer answer."""
    import numpy

    lengths = rows["length"] if "length" in rows.column_names else list(map(len, rows["input_ids"]))
    return rows.select(numpy.argsort(numpy.negative(lengths), kind="stable")[:count])


def choose_batch(trainer: Any, settings: Settings, longest: Any) -> Fit:
    """Find out by steps on the longest rows how a step's rows go through the model, and say it. Raises ModelError and StorageError."""
    import torch

    free, resting = memory()
    room, rows = ROOM * free, settings.rows_per_step
    sizes = [size for size in range(1, rows + 1) if rows % size == 0]
    size, gb = 1 if settings.is_batch_free else settings.rows_at_once, None
    while gb is None:
        if one_step(trainer, longest, size) is not None:
            step = functools.partial(one_step, trainer, longest, checkpoint=read_back(trainer))
            gb = step(size)  # with the optimizer's state, which the first step makes at its end
        if gb is None:
            refuse_to_shrink(size)
            size = max(smaller for smaller in sizes if smaller < size)
    fit, larger = Fit(size, trainer.args.gradient_checkpointing, gb), [each for each in sizes if each > size]
    if settings.is_batch_free and larger and (second := step(larger[0])) is not None and second <= room:
        fit = fit._replace(rows=larger[0], gb=second)
        each = (second - gb) / (larger[0] - size)  # GB that one more row takes
        for more in (more for more in reversed(larger[1:]) if gb + each * (more - size) <= room):
            if (taken := step(more)) is not None and taken <= room:
                fit = fit._replace(rows=more, gb=taken)
                break
    fit = without_checkpointing(trainer, step, fit, resting, room)
    passes, unit = settings.rows_per_step // fit.rows, "row" if settings.road == "sft" else "pair"
    passes = f"{passes} pass{'' if passes == 1 else 'es'}"
    how = "" if fit.again else ", without gradient checkpointing"
    taken = f"{how}: the longest take {fit.gb:.1f} of {free:.1f} GB VRAM" if torch.cuda.is_available() else ""
    say(f"trial: {counted(fit.rows, unit)} at once, {passes} a step{taken}")
    return fit


def memory() -> tuple[float, float]:
    """GB of GPU memory that are free for torch, with what it has already, and that it holds now."""
    import torch

    if not torch.cuda.is_available():
        return math.inf, 0.0
    return (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) / GB, torch.cuda.memory_allocated() / GB


def one_step(trainer: Any, longest: Any, size: int, checkpoint: Path | None = None) -> float | None:
    """Take an optimizer step, from a checkpoint or the weights as they are, on so many of the longest rows at once: the peak of GPU memory in GB, None where it is too small.

    Raises ModelError when the loss is no number.
    """
    import torch
    from accelerate.utils.memory import clear_device_cache

    args = trainer.args
    trainer.train_dataset = longest.select(range(min(size, len(longest))))
    args.per_device_train_batch_size, args.gradient_accumulation_steps = size, 1
    args.max_steps, args.save_strategy = (2, "no") if checkpoint else (1, "steps")
    trainer._train_batch_size = args.train_batch_size
    forget(trainer)
    clear_device_cache(garbage_collection=True)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if not fits(trainer, lambda: trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))):
        return None
    if not all(math.isfinite(float(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry):
        raise diverged("on the longest rows")
    return torch.cuda.max_memory_reserved() / GB if torch.cuda.is_available() else 0.0


def read_back(trainer: Any) -> Path:
    """The checkpoint that a step has left. Raises StorageError where it does not hold the adapter as it is."""
    import torch
    from peft import get_peft_model_state_dict, load_peft_weights
    from safetensors import SafetensorError

    found, kept = next(iter(numbered(Path(trainer.args.output_dir))), None), {}
    with contextlib.suppress(SafetensorError, OSError):
        kept = load_peft_weights(str(found), device="cpu") if found else {}
    wanted = get_peft_model_state_dict(trainer.model)
    if kept.keys() != wanted.keys() or not all(torch.equal(kept[name], wanted[name].cpu()) for name in wanted):
        raise StorageError(
            f"A checkpoint written to {Path(trainer.args.output_dir).parent} does not hold the adapter that was trained.",
            "Choose another `storage`: nothing that is trained would be safe there.",
        )
    return found


def without_checkpointing(trainer: Any, step: Any, fit: Fit, resting: float, room: float) -> Fit:
    """The fit without gradient checkpointing, where as many of the longest rows have room without it: a step then spares a third forward pass."""
    if not fit.again:
        return fit
    set_checkpointing(trainer, False)
    gb = step(1)
    if gb is not None and resting + (gb - resting) * fit.rows <= room:
        gb = step(fit.rows) if fit.rows > 1 else gb
        if gb is not None and gb <= room:
            return Fit(fit.rows, False, gb)
    set_checkpointing(trainer, True)
    return fit


def set_checkpointing(trainer: Any, again: bool) -> None:
    """Let the trainer's backward pass compute each block again (gradient checkpointing), or keep what it needs of it."""
    if again != trainer.args.gradient_checkpointing:
        trainer.args.gradient_checkpointing = again
        compute_blocks_again(trainer.model, again)


def answers_at_once(run: Run, model: Any, tokenizer: Any) -> int:
    """How many answers are generated together: one where those of a batch are others than those of single prompts. Raises ModelError."""
    import torch

    rows = run.rows("eval").select_columns(["input_ids"])[:ANSWERS_AT_ONCE]["input_ids"]
    prompts = [ids[: math.ceil(len(ids) / 2)] for ids in rows]
    together = Decoding(run.settings.max_new_tokens, batch_size=ANSWERS_AT_ONCE)
    try:
        return checked(model, tokenizer, prompts, together).batch_size
    except torch.OutOfMemoryError:
        todo = "Lower `max_length`, or choose a smaller model, and run again."
        raise ModelError("The GPU is out of memory with one answer at a time.", todo) from None


def convert(run: Run, later: list[Any], tokenizer: Any, adapter: tempfile.TemporaryDirectory) -> str:
    """What came of placing the adapter in the files that the settings ask for, and of comparing their tokens, which waits for llama.cpp: a callback in `later`.

    Raises ExportError and VerifyError.
    """
    if not run.settings.quantizations:
        return "no GGUF is asked for"
    if "adapter" in run.settings.quantizations:
        with adapter_alone(run.settings, Path(adapter.name)):
            pass
    if set(run.settings.quantizations) == {"adapter"}:
        return "the adapter becomes a GGUF"
    head = head_of(run.settings, Path(adapter.name), Path(adapter.name, "head"))
    if not compiled():
        later.append(when_compiled(functools.partial(compare, run, tokenizer, head), adapter))
        return "the adapter has its place in the GGUF; its tokens are compared as soon as llama.cpp is compiled"
    return f"the adapter has its place in the GGUF, and {compare(run, tokenizer, head)}"


def compare(run: Run, tokenizer: Any, head: Path) -> str:
    """What came of comparing a head's tokens. Raises VerifyError where they are others, unless the settings publish unverified files."""
    rows = run.rows("eval")
    try:
        texts = refuse_other_tokens(head, tokenizer, list(rows.select(range(min(TEXTS, len(rows))))))
    except VerifyError as error:
        if run.settings.publish_unverified:
            return f"it would fail its proof, which `publish_unverified` allows: {error}"
        raise
    return f"{counted(texts, 'text')} become the same tokens there"


def when_compiled(compare: Callable[[], str], folder: tempfile.TemporaryDirectory) -> Any:
    """A trainer callback that compares the tokens of a head, in a folder that goes with it, at a checkpoint by which llama.cpp is compiled.

    The training goes on whatever comes of it: with its adapter another model's GGUF or none may be wanted.
    """
    from transformers import TrainerCallback

    class WhenCompiled(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.due and compiled():
                self.due = False
                try:
                    say(f"trial: of the GGUF {compare()}")
                except (AutoSlothError, OSError) as error:
                    say(f"trial: {error}")
                folder.cleanup()

        due = True

    return WhenCompiled()
