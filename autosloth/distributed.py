"""Several processes, as `accelerate launch -m autosloth ...` starts them: all of them train, only the first writes files and prints."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

LAUNCHER = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
PATIENCE = timedelta(days=7)  # of those that wait for the first's data; torch's own ends after 10 or 30 minutes


def processes() -> int:
    """How many processes do this run; the launcher (torchrun, which accelerate uses too) tells it in the environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def number() -> int:
    """This process's number, from 0, among all of them."""
    return int(os.environ.get("RANK", "0")) if processes() > 1 else 0


def first() -> bool:
    """Whether this is the process that writes and speaks."""
    return number() == 0


def alone() -> dict[str, str]:
    """The environment for a program that is started by one process for itself, without what the launcher told about the others."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHER}


@functools.cache
def group() -> Any:
    """All processes, with torch's means to wait and to tell on the CPU, whatever they train on."""
    import torch
    import torch.distributed as distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")  # the one that accelerate then uses
    return distributed.new_group(backend="gloo", timeout=PATIENCE)


def of_first(find: Callable[[], Any]) -> Any:
    """What the first process finds, in all of them: they wait for it, and come to the same decisions."""
    if processes() == 1:
        return find()
    from torch.distributed import broadcast_object_list

    found = [find() if first() else None]
    broadcast_object_list(found, src=0, group=group())
    return found[0]


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if processes() > 1:
        from torch.distributed import barrier

        barrier(group=group())


def part() -> None:
    """No process waits for another from here on. Until it is called, gloo's threads may abort a process that ends."""
    if processes() > 1:
        from torch.distributed import destroy_process_group

        wait_for_all()
        destroy_process_group()
