"""The sides of `sft.py`: the demo's model and rows, trained by AutoSloth and by a plain script of Unsloth and TRL."""

from __future__ import annotations

from typing import Any

import gpu_sides
from gpu_meter import Meter
from sides import Case, play


def wanted(folder: str, settings: Case) -> Any:
    """The settings of both sides; the demo's base is given by its folder, as any model is."""
    from autosloth.demo import demo_base
    from autosloth.settings import SFTSettings

    return SFTSettings.load({"model": str(demo_base()), "dataset": "demo", "storage": folder, **settings})


def autosloth(folder: str, steps: int, settings: Case) -> Case:
    """AutoSloth's data stage and its own trainer."""
    from autosloth.data import prepare_data
    from autosloth.run import Run

    run = Run.create(wanted(folder, settings))
    prepare_data(run)
    return gpu_sides.autosloth({"run": str(run.folder), "steps": steps})


def plain(folder: str, steps: int, settings: Case) -> Case:
    """A script that gives TRL prompts and completions, which TRL tokenises and labels itself."""
    from autosloth.demo import sft_rows
    from autosloth.models.engine import start_engine

    start_engine()
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    s = wanted(folder, settings)
    model, tokenizer = gpu_sides.unsloth_model(s, torch.float32)
    tokenizer.chat_template = gpu_sides.chat_template()
    train, _ = sft_rows()
    turns = [(("prompt", "user", row["instruction"]), ("completion", "assistant", row["output"])) for row in train]
    rows = [{name: [{"role": role, "content": text}] for name, role, text in both} for both in turns]
    args = SFTConfig(
        output_dir=f"{folder}/plain", per_device_train_batch_size=s.batch_size, gradient_accumulation_steps=s.gradient_accumulation,
        learning_rate=s.learning_rate, lr_scheduler_type="linear", warmup_steps=s.warmup, max_steps=steps, optim="adamw_torch_fused",
        weight_decay=0.01, seed=s.seed, data_seed=s.seed, max_length=s.max_length, logging_steps=1, save_strategy="no", report_to=[],
        bf16=False, fp16=False, gradient_checkpointing=False, completion_only_loss=True,
    )  # fmt: skip
    return Meter(SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)).train()  # fmt: skip


if __name__ == "__main__":
    play([autosloth, plain])
