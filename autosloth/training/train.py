"""The training stage: measure the model, train its adapter with TRL, measure again, save what the proof needs."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..distributed import first, of_first, part
from ..errors import Interrupted, ModelError
from ..hardware import hardware, peak_ram_gb, peak_vram_gb, versions
from ..hub_copy import keep
from ..models import (
    TEMPLATE,
    choose_precision,
    identity,
    layer_counts,
    load_model,
    load_tokenizer,
    origin_of,
    refuse_without_gpu,
    save_adapter,
    save_tokenizer,
    starting_adapter,
)
from ..notebook import Interruption, progress_callback
from ..output import counted, say
from ..run import TENSORBOARD, Run, file_hash, stage
from ..settings import Settings, SFTSettings
from .batches import batches, fits, refuse_to_shrink, take_batches
from .checkpoints import is_over, kept_whole, last_checkpoint, resume, trainable, whole
from .held_out import HeldOut
from .measure import (
    ANSWERS_AT_ONCE,
    diverged,
    example,
    gained,
    is_four_bit,
    measure_answers,
    refuse_unscorable,
    save_reference,
)
from .trackers import trackers
from .trial import is_due, set_checkpointing, try_out

READS = (
    "load_in_4bit", "lora_r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "modules_to_save", "adapter", "batch_size", "gradient_accumulation", "epochs",
    "max_steps", "learning_rate", "precision", "scheduler", "scheduler_cycles", "warmup", "optimizer", "lora_plus_ratio", "weight_decay", "max_grad_norm",
    "init_lora_weights", "eval_steps", "keep", "patience",
)  # fmt: skip


DECAY = 0.2  # of the steps in which a stable learning rate falls: as good as a cosine over all (arXiv 2405.18392, section 4)


def adapter_input(run: Run) -> str | None:
    """What identifies the adapter to start from: its content."""
    folder = starting_adapter(run.settings)
    return file_hash(folder / "adapter_model.safetensors") if folder else None


training_stage = functools.partial(
    stage,
    "train",
    after=("data",),
    inputs=adapter_input,
    facts=("train", "trial", "eval", "hardware", "versions"),
    outputs=("adapter", "reference"),
    scratch=("checkpoints", TENSORBOARD),
    together=True,
    sets_aside=True,
)


@training_stage(reads=(*READS, "packing", "neftune_alpha"))
def train_adapter(run: Run) -> None:
    """Supervised fine-tuning: train the adapter from the last checkpoint on (or from the start) and write adapter/."""
    train(run, make_trainer, measure_answers)


def train(run: Run, make_trainer: Callable[..., Any], measure: Callable[..., tuple[dict, list]]) -> None:
    """Measure, train from the last checkpoint on (or from the start), measure again, and write adapter/ and reference/.

    make_trainer(run, model, tokenizer, train rows, held-out rows, callbacks) gives TRL's trainer; measure(trainer, tokenizer,
    held-out rows, settings, answers at once) the facts and the answers, as `measure_answers` does. Of several processes each does all of it but
    the writing: the trainer's batches, those of the measurement too, are shared out among them.
    """
    refuse_without_gpu(run.settings)
    if first():
        origin_of(run)  # while the Hub is known to be there
    settings, held_out, interruption = run.settings, run.rows("eval"), Interruption()
    refuse_unscorable(settings, held_out)
    tokenizer, model = load_tokenizer(settings, run.path(TEMPLATE)), load_model(settings)
    trainer = make_trainer(run, model, tokenizer, run.rows("train"), held_out, [progress_callback(interruption)])
    run.record("hardware", **hardware())
    run.record("versions", **versions())
    if is_due(run):
        for callback in try_out(run, trainer, tokenizer):
            trainer.add_callback(callback)
    at_once = run.facts.get("trial", {}).get("answers_at_once", ANSWERS_AT_ONCE)
    if of_first(lambda: "before" not in run.facts.get("eval", {})):
        run.record("eval", before=measure(trainer, tokenizer, held_out, settings, at_once)[0])
    on_the_way = HeldOut(run, trainer)
    trainer.add_callback(on_the_way.callback())
    with interruption:
        go_on(run, trainer)
    refuse_unfinished(trainer, interruption)
    record_training(run, trainer)
    run.record("train", **on_the_way.restore())
    facts, answers = measure(trainer, tokenizer, held_out, settings, at_once)
    record_after(run, facts)
    part()
    if not first():
        return
    warn_where_nothing_was_gained(run)
    if "ref" in model.peft_config:  # DPO's frozen copy, which PEFT would save beside the other
        model.delete_adapter("ref")
    save_trained(run, model, tokenizer, held_out, answers)


def record_after(run: Run, after: dict[str, Any]) -> None:
    """Keep what was measured after the training, and the scores of the answers beside those from before."""
    before = of_first(lambda: run.facts["eval"]["before"])
    run.record("eval", after=after, gained=gained(before, after, run.settings.seed))


def warn_where_nothing_was_gained(run: Run) -> None:
    """Say it where the held-out rows are less likely after the training than before."""
    before, after = (run.facts["eval"][when]["loss"] for when in ("before", "after"))
    if after > before:
        say(
            f"train: WARNING: the held-out loss rose, from {before:.4f} to {after:.4f}: the model was better before it was trained. Lower `learning_rate` or the number of steps, or look whether the rows to train on are like those held out."
        )


def save_trained(run: Run, model: Any, tokenizer: Any, held_out: Any, answers: list[dict[str, Any]]) -> None:
    """Write adapter/, with its tokenizer, and reference/, what the proof of the export needs."""
    folder = run.fresh("adapter")
    save_adapter(model, folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; ours is written last, in publish/
    if repaired := save_tokenizer(tokenizer, run.settings, folder):
        say(f"tokenizer: llama.cpp needs what the base's files leave out; added: {', '.join(repaired)}")
    save_reference(run, model, tokenizer, held_out, answers)
    run.record("example", **example(tokenizer, held_out))


def go_on(run: Run, trainer: Any) -> None:
    """Train from the last checkpoint in the trainer's folder on, or from the start, in smaller batches where the GPU's memory is too small.

    The batch that fitted is kept in the facts, for the next time. Transformers' own `auto_find_batch_size` would shrink the batch and
    leave the accumulation as it is, so that a step learns from fewer rows. Raises ModelError when one row at a time does not fit, and
    when the training changed nothing.
    """
    import torch

    take_batches(trainer, run.facts.get("train", {}).get("batch_size", trainer.args.per_device_train_batch_size))
    set_checkpointing(
        trainer, run.facts.get("trial", {}).get("gradient_checkpointing", trainer.args.gradient_checkpointing)
    )
    steer_steps(trainer, run.settings)
    for tracker in trackers(run, trainer):
        trainer.add_callback(tracker)
    start = {name: p.detach().to("cpu", copy=True) for name, p in trainable(trainer.model)}
    while True:
        with kept_whole(trainer, run.settings.save_total, functools.partial(keep, run.settings)) as folder:
            checkpoint = of_first(lambda folder=folder: last_checkpoint(folder))
            if checkpoint:
                say(f"train: going on from {checkpoint.name}")
            fitted = fits(trainer, functools.partial(resume, trainer, checkpoint))
        if fitted:
            return refuse_unmoved(trainer, start)
        take_less(run, trainer)
        with torch.no_grad():
            for name, weight in trainable(trainer.model):
                weight.copy_(start[name])


def take_less(run: Run, trainer: Any) -> None:
    """Let the trainer do with less memory from now on, and say and keep it: compute blocks again where it did not, else take fewer rows at once. Raises ModelError."""
    size, trial = trainer.args.per_device_train_batch_size, run.facts.get("trial", {})
    if trial.get("gradient_checkpointing") is False:
        run.record("trial", gradient_checkpointing=True)
        set_checkpointing(trainer, True)
        return say("train: no GPU memory without gradient checkpointing; going on with it")
    refuse_to_shrink(size)
    take_batches(trainer, size // 2)
    run.record("train", **batches(trainer))
    fewer, times = trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps
    again = f"going on with {fewer} and gradient_accumulation {times}, as many rows a step"
    say(f"train: no GPU memory for batch_size {size}; {again}")


def steer_steps(trainer: Any, settings: Settings) -> None:
    """Let the trainer make its optimizer and its schedule as the settings say; says where a warm-up would take all of its steps, the first of which has a learning rate of 0."""
    create = trainer.create_scheduler

    def create_scheduler(num_training_steps: int, optimizer: Any = None) -> Any:
        trainer.args.warmup_steps = settings.warmup_steps(num_training_steps)
        trainer.args.lr_scheduler_kwargs = schedule(settings, num_training_steps)
        if reason := settings.shorter_warmup(num_training_steps):
            say(f"train: {reason}")
        return create(num_training_steps, optimizer)

    trainer.create_scheduler = create_scheduler
    if settings.lora_plus_ratio != 1:
        trainer.create_optimizer = functools.partial(lora_plus, trainer, settings)


def schedule(settings: Settings, steps: int) -> dict[str, Any] | None:
    """What transformers needs to know of the schedule of a training of so many steps, besides its name and warm-up."""
    if settings.scheduler == "cosine_with_restarts":
        return {"num_cycles": settings.scheduler_cycles}
    if settings.scheduler == "warmup_stable_decay":
        falls = max(1, min(round(steps * DECAY), steps - settings.warmup_steps(steps)))
        return {"num_decay_steps": falls, "decay_type": "linear"}
    return None


def lora_plus(trainer: Any, settings: Settings, model: Any = None) -> Any:
    """The trainer's optimizer with another learning rate for B than for A, by PEFT (LoRA+, arXiv 2402.12354, section 4)."""
    from peft.optimizers import create_loraplus_optimizer

    if trainer.optimizer is None:
        model = model or trainer.model
        kind, values = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
        values |= {"loraplus_lr_ratio": settings.lora_plus_ratio, "loraplus_weight_decay": settings.weight_decay}
        trainer.optimizer = create_loraplus_optimizer(model, kind, **values)
    return trainer.optimizer


def refuse_unmoved(trainer: Any, start: dict[str, Any]) -> None:
    """Raises ModelError when a finished training left all weights as they were: what would be measured and published is the start."""
    import torch

    def moved(name: str, weight: Any) -> bool:
        return not torch.equal(whole(weight).cpu(), start[name])

    finished = is_over(vars(trainer.state))
    if finished and not any(moved(name, weight) for name, weight in trainable(trainer.model)):
        raise ModelError(
            f"The training changed no weight in {counted(trainer.state.global_step, 'step')} at a learning rate of {trainer.args.learning_rate:g}.",
            "Raise `learning_rate` and run again: there is nothing to measure or to export yet.",
        )


def refuse_unfinished(trainer: Any, interruption: Interruption) -> None:
    """Raises ModelError when a loss is no number any more, Interrupted when the user stopped the training."""
    wrong = [e["step"] for e in trainer.state.log_history if "loss" in e and not math.isfinite(float(e["loss"]))]
    if wrong:
        raise diverged(f"from step {wrong[0]} on")
    if interruption.asked and not is_over(vars(trainer.state)):
        done = f"step {trainer.state.global_step} of {trainer.state.max_steps}"
        raise Interrupted(
            f"Training was stopped after {done}, with a checkpoint.", "Run the same again to go on from there."
        )


def make_trainer(run: Run, model: Any, tokenizer: Any, train: Any, held_out: Any, callbacks: list[Any]) -> Any:
    """TRL's SFTTrainer for the settings of a run."""
    import torch

    dtype, _ = choose_precision(run.settings)
    arguments = sft_arguments(run.settings, run.path("checkpoints"), dtype, torch.cuda.is_available())
    return sft_trainer(arguments, model, tokenizer, train, held_out, callbacks)


def sft_trainer(
    arguments: dict[str, Any], model: Any, tokenizer: Any, train: Any, held_out: Any, callbacks: list[Any]
) -> Any:
    """TRL's SFTTrainer on rows that are tokenised and labelled already, which TRL's own collator takes as they are.

    With any other collator Unsloth turns packing and batches without padding off (2026.10, trainer.py).
    """
    from trl import SFTConfig, SFTTrainer

    columns = ["input_ids", "labels"]
    with adapter_unrounded(model):
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**arguments),
            train_dataset=train.select_columns(columns),
            eval_dataset=held_out.select_columns(columns),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    return without_bars(trainer)


@contextlib.contextmanager
def adapter_unrounded(model: Any) -> Iterator[None]:
    """Keep the adapter's weights as they are while TRL makes its trainer: on a model in 4 bit trl 1.15 rounds them to bfloat16.

    An update may be smaller than what that tells apart, and DPO's reference, copied before, would be another model. For a GPU Unsloth
    leaves it out (2026.10, models/rl.py), for its CPU backend it does not.
    """
    weights = {name: parameter.data for name, parameter in trainable(model)}
    yield
    for name, parameter in trainable(model):
        if parameter.dtype != weights[name].dtype:
            parameter.data = weights[name].to(parameter.device)


def without_bars(trainer: Any) -> Any:
    """The trainer without what it prints itself."""
    from transformers import PrinterCallback, ProgressCallback

    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def sft_arguments(settings: SFTSettings, checkpoints: Path, dtype: str, gpu: bool) -> dict[str, Any]:
    """Every value that supervised training depends on, as SFTConfig takes it."""
    if settings.packing and not gpu:
        say("train: packing is off (it needs a GPU)")
    noise = {"neftune_noise_alpha": settings.neftune_alpha, "padding_free": False} if settings.neftune_alpha else {}
    return plain_arguments(settings, checkpoints, dtype, gpu) | {"packing": settings.packing and gpu, **noise}


def plain_arguments(settings: Settings, checkpoints: Path, dtype: str, gpu: bool) -> dict[str, Any]:
    """What learning from single answers depends on, in supervised training and in self-play's comparison with it."""
    return training_arguments(settings, checkpoints, dtype, gpu) | {
        "neftune_noise_alpha": None,
        "packing": False,
        "eval_packing": False,
        "padding_free": None,  # Unsloth chooses, by the GPU and the lengths of the rows
        "completion_only_loss": False,  # the labels say already what is learnt
        "assistant_only_loss": False,
        "loss_type": "nll",
    }


def training_arguments(settings: Settings, checkpoints: Path, dtype: str, gpu: bool) -> dict[str, Any]:
    """Every value that training of any kind depends on, as TRL takes it; none is left to a default that Unsloth may change."""
    return {
        "output_dir": str(checkpoints),
        "per_device_train_batch_size": settings.rows_at_once,
        "per_device_eval_batch_size": settings.rows_at_once,
        "gradient_accumulation_steps": settings.rows_per_step // settings.rows_at_once,
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.scheduler,
        "lr_scheduler_kwargs": None,  # `steer_steps` sets them, by the number of steps
        "warmup_steps": settings.warmup,
        "optim": available_optimizer(settings, gpu),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "fp16": dtype == "float16",
        "bf16": dtype == "bfloat16",
        "max_length": settings.max_length,
        "router_aux_loss_coef": 0.0,  # routers are not trained; of answers alone their balance is not to be judged
        "gradient_checkpointing": gpu,
        "logging_steps": 1,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # a loss that is no number shall be seen
        "include_num_input_tokens_seen": "non_padding",
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_steps": settings.save_steps,
        "save_total_limit": None,  # `keep` deletes the older ones
        "report_to": [],  # `trackers` adds those of the settings, each so that it can fail
        "push_to_hub": False,
        "dataloader_num_workers": 0,
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }


def available_optimizer(settings: Settings, gpu: bool) -> str:
    """The optimizer by its name in transformers, as this hardware can; says what was chosen instead and why."""
    if settings.optimizer == "lion":
        return "lion_32bit"  # of an adapter its one state is small
    if gpu or "8bit" not in settings.optimizer:
        return settings.optimizer
    say(f"train: the optimizer is adamw_torch_fused ({settings.optimizer} needs a GPU)")
    return "adamw_torch_fused"


def record_training(run: Run, trainer: Any) -> None:
    """Write the facts of the finished training, taken from the trainer's own log."""
    run.record("train", **told_by(trainer), **about(trainer, run.settings))


def told_by(trainer: Any) -> dict[str, Any]:
    """The facts in the trainer's own log."""
    log = [entry for entry in trainer.state.log_history if "loss" in entry and "seconds" in entry]
    seconds, tokens = log[-1]["seconds"], int(trainer.state.num_input_tokens_seen)
    return {
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch, 3),
        "seconds": seconds,
        "first_loss": round(float(log[0]["loss"]), 4),
        "last_loss": round(float(log[-1]["loss"]), 4),
        "losses": [[entry["step"], round(float(entry["loss"]), 4)] for entry in log],
        **rewards(log),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        **({"energy_wh": log[-1]["energy_wh"]} if log[-1].get("energy_wh") is not None else {}),
    }


def about(trainer: Any, settings: Settings) -> dict[str, Any]:
    """What was trained, in which precision, and the memory it took."""
    return dict(
        peak_vram_gb=peak(peak_vram_gb(), trainer.state.log_history, "peak_vram_gb"),
        peak_ram_gb=peak(peak_ram_gb(), trainer.state.log_history, "peak_ram_gb"),
        trainable_parameters=sum(parameter.numel() for _, parameter in trainable(trainer.model)),
        **batches(trainer),
        warmup_steps=settings.warmup_steps(trainer.state.max_steps),
        **adapter_shape(trainer.model),
        precision=choose_precision(settings)[0],
        four_bit=is_four_bit(trainer.model),
        optimizer=str(trainer.args.optim.value),
        base=identity(settings),
    )


def adapter_shape(model: Any) -> dict[str, Any]:
    """Rank, scale and kind of the adapter, which layers it reaches, and what the base takes besides text, which is not trained."""
    config, base = model.peft_config["default"], model.config
    others = {"pictures": "vision_config", "sounds": "audio_config"}
    return dict(
        lora_r=config.r,
        saved_r=config.r * (2 if hasattr(model, "adapter_start") else 1),  # which loaders need to know
        lora_alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        layers=layer_counts(model),
        not_trained=[name for name, part in others.items() if getattr(base, part, None) is not None],
    )


def peak(now: float | None, told: list[dict[str, Any]], name: str) -> float | None:
    """The most memory of this process and of those that wrote these entries: a resumed training has had several; None without a GPU.

    >>> peak(1.0, [{"gb": 3.0}, {"gb": None}, {}], "gb"), peak(None, [{}], "gb")
    (3.0, None)
    """
    return max((size for size in (now, *(entry.get(name) for entry in told)) if size is not None), default=None)


def rewards(log: list[dict[str, Any]]) -> dict[str, Any]:
    """What DPO's log tells besides the loss, by step: both answers' log-probabilities (nats), the margin of their rewards, the accuracy."""
    told = ("logps/chosen", "logps/rejected", "rewards/margins", "rewards/accuracies")
    steps = [[entry["step"], *(round(float(entry[name]), 4) for name in told)] for entry in log if told[0] in entry]
    return {"rewards": steps} if steps else {}
