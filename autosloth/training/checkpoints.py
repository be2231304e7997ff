"""Checkpoints: kept whole, training from the last one on, and what of the model they hold."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..distributed import first, of_first, processes, wait_for_all
from ..errors import StorageError
from ..models import save_start, take_start
from ..notebook import DRIVE
from ..output import say
from ..run import HALF_WRITTEN, file_hash, fingerprint, move, out_of_the_way, read_json, remove, write_json

WHOLE = "whole.json"  # in a checkpoint: the SHA-256 of each of its files; written last


def trainable(model: Any) -> list[tuple[str, Any]]:
    """The parameters that are trained, with their names."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def whole(weight: Any) -> Any:
    """A parameter's values, of which several processes may hold a part each (FSDP): all of them call it."""
    return (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach()


def fill(weight: Any, values: Any) -> None:
    """Give a parameter these values, as `whole` told them."""
    if hasattr(weight, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values.to(weight.device), weight.device_mesh, weight.placements)
    weight.copy_(values)


def is_over(state: Mapping[str, Any]) -> bool:
    """Whether a training has ended, by its trainer's state: after its last step, or before where the held-out loss fell no more."""
    return state["global_step"] >= state["max_steps"] or any("stopped" in entry for entry in state["log_history"])


def resume(trainer: Any, checkpoint: Path | None) -> None:
    """Train from a checkpoint, or from the start; a checkpoint of the last step is only loaded.

    Resumed from its last step, the trainer of transformers 5.17 would take one step more.
    """
    state = read_json(checkpoint / "trainer_state.json") if checkpoint else {}
    if checkpoint:
        take_start(trainer.model, checkpoint)
    if checkpoint and is_over(state):
        from peft import load_peft_weights, set_peft_model_state_dict
        from transformers import TrainerState

        set_peft_model_state_dict(trainer.model, load_peft_weights(str(checkpoint), device="cpu"))
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        return
    if processes() > 1:
        # A model that was measured passes for prepared: accelerate 1.15 would leave out what keeps the processes' weights equal.
        vars(trainer.model).pop("_is_accelerate_prepared", None)
        load_to_numbered_cpus()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


@functools.cache
def load_to_numbered_cpus() -> None:
    """Let torch load a checkpoint to `cpu:0`, as accelerate 1.15 calls the place of a process without a GPU: torch 2.13 knows only `cpu`."""
    from torch.serialization import register_package

    register_package(
        100, lambda storage: None, lambda storage, place: storage if re.fullmatch(r"cpu:\d+", place) else None
    )


@contextlib.contextmanager
def kept_whole(trainer: Any, total: int, afterwards: Callable[[], None]) -> Iterator[Path]:
    """In the block the trainer's checkpoints get to its folder, which this gives, when they are whole: it writes them elsewhere. total: how many stay; afterwards: called after each."""
    kept = Path(trainer.args.output_dir)
    scratch, keeper = scratch_of(kept), keeping(trainer.model, kept, total, afterwards)
    of_first(lambda: remove(scratch))
    trainer.args.output_dir = str(scratch)
    trainer.add_callback(keeper)
    try:
        yield kept
    finally:
        trainer.remove_callback(keeper)
        trainer.args.output_dir = str(kept)
        if first():
            shutil.rmtree(scratch, ignore_errors=True)


def scratch_of(kept: Path) -> Path:
    """Where checkpoints are written: beside, where they only need another name; of a disk that flushes late, on this machine's own."""
    if processes() > 1 or not flushes_late(kept):
        return kept.with_name(f".{kept.name}{HALF_WRITTEN}")
    return Path(tempfile.gettempdir(), f"autosloth-{fingerprint(str(kept.absolute()))}{HALF_WRITTEN}")


def flushes_late(path: Path) -> bool:
    """Whether a path lies on Google Drive or another file system of a program's own (FUSE), which may tell of files what is not yet so."""
    import psutil

    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    path = path.absolute()
    nearest = next((mounts[folder] for folder in (path, *path.parents) if folder in mounts), "")
    return path.is_relative_to(DRIVE) or nearest.startswith("fuse")


def keeping(model: Any, kept: Path, total: int, afterwards: Callable[[], None]) -> Any:
    """A trainer callback that keeps each checkpoint that was written, when all processes have written their part."""
    from transformers import TrainerCallback

    class Keeping(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            wait_for_all()
            checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
            if first():
                save_start(model, checkpoint)
            of_first(lambda: keep(checkpoint, kept, total))
            afterwards()

    return Keeping()


def keep(checkpoint: Path, kept: Path, total: int) -> None:
    """Move a checkpoint to where it is kept, whole; of those before it some stay, should the disk lose some of this one. total: how many with it."""
    seal(checkpoint)
    kept.mkdir(parents=True, exist_ok=True)
    remove(out_of_the_way(kept / checkpoint.name))
    move(checkpoint, kept / checkpoint.name)
    for older in numbered(kept)[:-total]:
        remove(out_of_the_way(older))


def seal(folder: Path) -> None:
    """Write what tells that a folder is whole: the hash of each of its files, which are on the disk by then."""
    hashes = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != WHOLE):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        hashes[path.relative_to(folder).as_posix()] = file_hash(path)
    write_json(folder / WHOLE, hashes)


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that should be as it was sealed; None where nothing is."""
    try:
        hashes = read_json(folder / WHOLE)
    except StorageError:
        return f"{WHOLE} cannot be read"
    if not hashes:
        return f"{WHOLE} is missing"
    lost = next((name for name in hashes if not (folder / name).is_file()), None)
    other = next((name for name, known in hashes.items() if not lost and file_hash(folder / name) != known), None)
    return f"{lost} is missing" if lost else f"{other} is not as it was written" if other else None


def numbered(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, the newest last."""
    found = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")}
    return sorted((path for path, step in found.items() if step), key=lambda path: int(found[path][1]))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; newer ones, which a disk has lost some of, are removed, said."""
    found = numbered(folder)
    for checkpoint in reversed(found):
        if not (fault := damage(checkpoint)):
            return checkpoint
        say(f"train: {checkpoint.name} is damaged ({fault}) and passed over")
        remove(out_of_the_way(checkpoint))
    if found:
        say("train: no checkpoint is whole; going on from the start")
    return None
