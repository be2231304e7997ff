"""Checkpoints: training from the last one on, and what of the model they hold."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..distributed import processes
from ..errors import StorageError
from ..run import read_json


def trainable(model: Any) -> list[tuple[str, Any]]:
    """The parameters that are trained, with their names."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def resume(trainer: Any, checkpoint: Path | None) -> None:
    """Train from a checkpoint, or from the start; a checkpoint of the last step is only loaded.

    Resumed from its last step, the trainer of transformers 5.17 would take one step more.
    """
    state = read_json(checkpoint / "trainer_state.json") if checkpoint else {}
    if checkpoint and state["global_step"] >= state["max_steps"]:
        from peft import load_peft_weights, set_peft_model_state_dict
        from transformers import TrainerState

        set_peft_model_state_dict(trainer.model, load_peft_weights(str(checkpoint), device="cpu"))
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        return
    if processes() > 1:
        # A model that was measured passes for prepared: accelerate 1.15 would leave out what keeps the processes' weights equal.
        vars(trainer.model).pop("_is_accelerate_prepared", None)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


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
