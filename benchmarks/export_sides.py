"""The sides of `export.py`: GGUF files of a base with an adapter by AutoSloth and by the official route; and a copy of as many bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from sides import Case, play

PART = 1 << 24  # bytes read or written at once


def autosloth(base: str, out: str, kinds: list[str], **_: Any) -> Case:
    """Every type from one pass over the base. The adapter is that of the run folder beside the base."""
    from autosloth.export import gguf
    from autosloth.run import Run
    from autosloth.settings import SFTSettings

    run, folder = Run.create(SFTSettings(model=base, storage=str(Path(base).parent), run_name="run")), Path(out)
    gguf.lay_source(folder / "source", Path(base), run.path("adapter"))
    files = {kind: folder / f"{kind}.gguf" for kind in kinds}
    return {"files": gguf.convert(run, folder / "source", files, run.path("adapter"))}


def cp(base: str, made: str, out: str, **_: Any) -> Case:
    """Every byte of the base is read, and every byte of the GGUF files in `made` is written and synced."""
    for path in Path(base).glob("*.safetensors"):
        with open(path, "rb", buffering=0) as file:
            while file.read(PART):
                pass
    for path in Path(made).glob("*.gguf"):
        with open(path, "rb", buffering=0) as file, open(Path(out, path.name), "wb", buffering=0) as copy:
            while part := file.read(PART):
                copy.write(part)
            os.fsync(copy.fileno())
    return {}


def official(base: str, adapter: str, out: str, kinds: list[str], **_: Any) -> Case:
    """PEFT's merge, `save_pretrained` and llama.cpp's converter, to the first type."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from autosloth.export.llama import fetch_converter

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(f"{out}/merged")
    AutoTokenizer.from_pretrained(base).save_pretrained(f"{out}/merged")
    del model
    converter, kind = fetch_converter() / "convert_hf_to_gguf.py", kinds[0]
    subprocess.run([sys.executable, converter, f"{out}/merged", "--outtype", kind, "--outfile", f"{out}/{kind}.gguf"], check=True)  # fmt: skip
    return {}


if __name__ == "__main__":
    play([autosloth, cp, official])
