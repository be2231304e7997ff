"""The training stage: measure the base, fine-tune its adapter with TRL, measure again, keep what the proof needs."""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import math
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .base import refuse_without_gpu
from .errors import Interrupted, ModelError, StorageError
from .generate import answer, end_tokens
from .live import Interruption, peak_ram_gb, peak_vram_gb, progress_callback
from .model import (
    answering,
    choose_precision,
    encode_prompt,
    load_model,
    load_tokenizer,
    save_tokenizer,
)  # fmt: skip
from .run import GB, Run, read_json, say, stage, write_json
from .settings import SFTSettings

VERSIONS = ["autosloth", "unsloth", "unsloth_zoo", "trl", "peft", "transformers", "datasets", "torch", "bitsandbytes"]
VERSIONS += ["llama_cpp_python"]
SAMPLE_LENGTH = 400
SAMPLES = 3  # questions whose answers are shown before and after
REFERENCE_POSITIONS = 256  # next-token distributions kept for the proof: 33 MB with a vocabulary of 32,000


@stage(
    "train",
    reads=(
        "load_in_4bit", "lora_r", "lora_alpha", "lora_dropout", "batch_size", "gradient_accumulation", "epochs",
        "max_steps", "learning_rate", "scheduler", "warmup", "optimizer", "weight_decay", "max_grad_norm", "packing",
    ),
    after=("data",),
    facts=("train", "eval", "hardware", "versions"),
    outputs=("adapter", "reference"),
    scratch=("checkpoints",),
)  # fmt: skip
def train_adapter(run: Run) -> None:
    """Train the adapter from the last checkpoint on (or from the start) and write adapter/."""
    refuse_without_gpu(run.settings)
    settings, held_out, interruption = run.settings, run.rows("eval"), Interruption()
    tokenizer, model = load_tokenizer(settings), load_model(settings)
    trainer = make_trainer(run, model, tokenizer, run.rows("train"), held_out, interruption)
    run.record("hardware", **hardware())
    run.record("versions", **versions())
    if "before" not in run.facts.get("eval", {}):
        run.record("eval", before=measure(trainer, tokenizer, held_out, settings)[0])
    checkpoint = last_checkpoint(run.path("checkpoints"))
    if checkpoint:
        say(f"train: going on from {checkpoint.name}")
    with memory_errors(settings), interruption:
        go_on(trainer, checkpoint)
    refuse_divergence(trainer)
    if interruption.asked and trainer.state.global_step < trainer.state.max_steps:
        done = f"step {trainer.state.global_step} of {trainer.state.max_steps}"
        raise Interrupted(
            f"Training was stopped after {done}, with a checkpoint.", "Run the same again to go on from there."
        )
    record_training(run, trainer)
    facts, answers = measure(trainer, tokenizer, held_out, settings)
    run.record("eval", after=facts)
    folder = run.fresh("adapter")
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; ours is written last, in publish/
    save_tokenizer(tokenizer, settings, folder)
    save_reference(run, model, tokenizer, held_out, answers)


def go_on(trainer: Any, checkpoint: Path | None) -> None:
    """Train from a checkpoint, or from the start; a checkpoint of the last step is only loaded.

    Resumed from its last step, the trainer of transformers 5.17 would take one step more.
    """
    state = read_json(checkpoint / "trainer_state.json") if checkpoint else {}
    if checkpoint and state["global_step"] >= state["max_steps"]:
        from peft import load_peft_weights, set_peft_model_state_dict
        from transformers import TrainerState

        set_peft_model_state_dict(trainer.model, load_peft_weights(str(checkpoint), device="cpu"))
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def refuse_divergence(trainer: Any) -> None:
    """Raises ModelError when a loss is no number any more."""
    wrong = [e["step"] for e in trainer.state.log_history if "loss" in e and not math.isfinite(float(e["loss"]))]
    if wrong:
        raise diverged(f"from step {wrong[0]} on")


def diverged(when: str) -> ModelError:
    """The error of a loss that is no number."""
    todo = "Lower `learning_rate` (and `lora_alpha`, if it was raised), and run again."
    return ModelError(f"The loss is no number {when}: training diverged.", todo)


@contextlib.contextmanager
def memory_errors(settings: SFTSettings) -> Iterator[None]:
    """Turn a full GPU into a ModelError that says what to change."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise ModelError(
            f"The GPU is out of memory with batch_size {settings.batch_size} and max_length {settings.max_length}.",
            "Halve `batch_size` and double `gradient_accumulation` (the result is the same), or lower `max_length`, and run again.",
        ) from None


def make_trainer(run: Run, model: Any, tokenizer: Any, train: Any, held_out: Any, interruption: Interruption) -> Any:
    """TRL's SFTTrainer on rows that are tokenised and labelled already."""
    import torch
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, ProgressCallback
    from trl import SFTConfig, SFTTrainer

    columns, gpu = ["input_ids", "labels"], torch.cuda.is_available()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**training_arguments(run.settings, run.path("checkpoints"), choose_precision()[0], gpu)),
        train_dataset=train.select_columns(columns),
        eval_dataset=held_out.select_columns(columns),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[progress_callback(interruption)],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def training_arguments(settings: SFTSettings, checkpoints: Path, dtype: str, gpu: bool) -> dict[str, Any]:
    """Every value that training depends on, as SFTConfig takes it; none is left to a default that Unsloth may change."""
    optimizer, packing = available(settings, gpu)
    return {
        "output_dir": str(checkpoints),
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.scheduler,
        "warmup_steps": settings.warmup,
        "optim": optimizer,
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
        "packing": packing,
        "eval_packing": False,
        "completion_only_loss": False,  # the labels say already what is learnt
        "assistant_only_loss": False,
        "loss_type": "nll",
        "gradient_checkpointing": gpu,
        "logging_steps": 1,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # a loss that is no number shall be seen
        "include_num_input_tokens_seen": "non_padding",
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_steps": settings.save_steps,
        "save_total_limit": 2,
        "report_to": [],
        "push_to_hub": False,
        "dataloader_num_workers": 0,
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }


def available(settings: SFTSettings, gpu: bool) -> tuple[str, bool]:
    """The optimizer and whether to pack, as this hardware can; says what was chosen instead and why."""
    optimizer, packing = settings.optimizer, settings.packing and gpu
    if not gpu and "8bit" in optimizer:
        optimizer = "adamw_torch_fused"
        say(f"optimizer: {optimizer} ({settings.optimizer} needs a GPU)")
    if settings.packing and not gpu:
        say("packing: off (it needs a GPU)")
    return optimizer, packing


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; half-written ones are removed.

    The trainer writes trainer_state.json last (transformers 5.17, Trainer._save_checkpoint).
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    while found:
        newest = found.pop()
        if is_whole(newest):
            return newest
        shutil.rmtree(newest)
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint's last file, trainer_state.json, is there and can be read."""
    try:
        return "global_step" in read_json(checkpoint / "trainer_state.json")
    except StorageError:
        return False


def record_training(run: Run, trainer: Any) -> None:
    """Write the facts of the finished training, taken from the trainer's own log."""
    log = [entry for entry in trainer.state.log_history if "loss" in entry and "seconds" in entry]
    seconds, tokens = log[-1]["seconds"], int(trainer.state.num_input_tokens_seen)
    run.record(
        "train",
        steps=trainer.state.global_step,
        epochs=round(trainer.state.epoch, 3),
        seconds=seconds,
        first_loss=round(float(log[0]["loss"]), 4),
        last_loss=round(float(log[-1]["loss"]), 4),
        losses=[[entry["step"], round(float(entry["loss"]), 4)] for entry in log],
        tokens=tokens,
        tokens_per_second=round(tokens / seconds, 1),
        peak_vram_gb=peak_vram_gb(),
        peak_ram_gb=peak_ram_gb(),
        trainable_parameters=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        precision=choose_precision()[0],
        four_bit=is_four_bit(trainer.model),
        optimizer=str(trainer.args.optim.value),
    )


def measure(
    trainer: Any, tokenizer: Any, held_out: Any, settings: SFTSettings
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """How well the model stands: the facts, and each held-out question's prompt and greedy answer as token ids.

    loss is the mean negative log-likelihood of the answers' tokens, in nats; exact_match the share of
    held-out questions whose greedy answer is the expected text.
    """
    loss = trainer.evaluate()["eval_loss"]
    if not math.isfinite(loss):
        raise diverged("on the held-out rows")
    facts = {"loss": round(loss, 4), "perplexity": round(math.exp(min(loss, 50)), 3)}
    rows = [row for row in held_out.select(range(min(settings.eval_answers, len(held_out)))) if row["messages"]]
    chats = [row["messages"] for row in rows]
    prompts = [encode_prompt(tokenizer, row["messages"][:-1], row["tools"]) for row in rows]
    answers = answer(trainer.model, tokenizer, prompts, settings.max_new_tokens, settings.batch_size)
    given = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]
    if chats:
        expected = [chat[-1]["content"] for chat in chats]
        facts["exact_match"] = round(sum(a == b for a, b in zip(given, expected, strict=True)) / len(given), 4)
        facts["answers_compared"] = len(given)
        facts["answers_cut"] = sum(len(ids) >= settings.max_new_tokens for ids in answers)
        facts["samples"] = [
            {"question": shortened(chat[-2]["content"]), "expected": shortened(right), "answer": shortened(text)}
            for chat, right, text in zip(chats[:SAMPLES], expected, given, strict=False)
        ]
    return facts, [{"prompt": prompt, "answer": ids} for prompt, ids in zip(prompts, answers, strict=True)]


def shortened(text: str) -> str:
    """A text of at most SAMPLE_LENGTH characters: samples reach the card, and rows may be long."""
    return text if len(text) <= SAMPLE_LENGTH else text[:SAMPLE_LENGTH] + " ..."


def save_reference(run: Run, model: Any, tokenizer: Any, held_out: Any, answers: list[dict[str, Any]]) -> None:
    """Write reference/: what the trained model says, so that the exported file can be held against it without loading the model again.

    rows.json: `texts`, the held-out rows (`messages`, `tools`, `text`, `input_ids`); `rows`, the ids that logprobs.npy
    goes with, of held-out rows and, where they are too few, of training rows; the model's own greedy `answers`.
    logprobs.npy: float32 (positions, vocabulary), natural log of each next token's probability.
    """
    import numpy
    import torch

    rows, left = [], REFERENCE_POSITIONS
    logprobs = []
    with answering(model):
        for row in itertools.chain(held_out, run.rows("train")):
            ids = row["input_ids"][:left]
            logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0]
            logprobs.append(torch.log_softmax(logits.float(), dim=-1).cpu().numpy())
            rows.append(ids)
            left -= len(ids)
            if left <= 0:
                break
    texts = held_out.select_columns(["messages", "tools", "text", "input_ids"])
    folder = run.fresh("reference")
    numpy.save(folder / "logprobs.npy", numpy.concatenate(logprobs))
    ends = end_tokens(model, tokenizer)
    write_json(
        folder / "rows.json",
        {
            "texts": list(texts),
            "rows": rows,
            "answers": answers,
            "bos": tokenizer.bos_token_id,
            "ends": ends,
            "end": tokenizer.eos_token,
            "quantized": is_four_bit(model),
        },
    )


def is_four_bit(model: Any) -> bool:
    """Whether the base was loaded in 4 bit."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model.config, "quantization_config", None))


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
