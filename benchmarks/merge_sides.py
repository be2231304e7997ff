"""The sides of `merge.py`: the adapter of a folder is merged into the base of another by AutoSloth and by PEFT; and `cp` of the base."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from big_models import anonymous
from sides import Case, play

GB = 1e9


class Watch(threading.Thread):
    """Looks at the process's memory all the time: `peak`, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.start()

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, anonymous(os.getpid()))
            time.sleep(0.02)


def measured(work: Callable[[], Any]) -> Case:
    """What a piece of work takes: seconds until its bytes are on the disk, until written, of CPU with children; GB."""
    imports, watch = anonymous(os.getpid()), Watch()
    started, cpu = time.perf_counter(), sum(os.times()[:4])
    work()
    written, used = time.perf_counter() - started, sum(os.times()[:4]) - cpu
    os.sync()
    seconds = {"seconds": time.perf_counter() - started, "seconds_without_sync": written, "cpu_seconds": used}
    return seconds | {"peak_anonymous_gb": max(watch.peak, imports) / GB, "imports_gb": imports / GB}


def autosloth(base: str, adapter: str, out: str, **_: Any) -> Case:
    """Shard by shard."""
    import peft  # noqa: F401 (imports are not timed)
    import torch  # noqa: F401
    from transformers import Qwen2ForCausalLM  # noqa: F401

    from autosloth.export.merge import merge_model

    return measured(lambda: merge_model(Path(base), Path(adapter), Path(out)))


def peft(base: str, adapter: str, out: str, **_: Any) -> Case:
    """The whole model in memory."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, Qwen2ForCausalLM  # noqa: F401

    def merge() -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)

    return measured(merge)


def cp(base: str, out: str, **_: Any) -> Case:
    """As many bytes read and written, and nothing done with them."""
    return measured(lambda: subprocess.run(["cp", *map(str, Path(base).glob("*.safetensors")), out], check=True))


if __name__ == "__main__":
    play([autosloth, peft, cp])
