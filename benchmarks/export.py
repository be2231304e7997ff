"""What the export costs beside the official route and beside copying the same bytes: `make bench`.

Makes a bfloat16 model of random weights with Qwen 2's real vocabulary and a LoRA adapter (rank 16, all linear layers) in a
temporary folder ($TMPDIR). Then, in one run on one disk, in turn: our export to Q8_0; `cp` of as many bytes, which is every byte
of the base read and every byte of the result written and synced; and at last the official route, which is PEFT's merge on
the CPU, `save_pretrained` and llama.cpp's converter. The base is dropped from the page cache some seconds before each.
`--large` adds the 7.6B model (Qwen2.5-7B's shapes: 32 GB of disk); `--official` runs the official route on that too (16 GB of RAM).
Writes benchmarks/results/export.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GB = 1e9
ROUNDS, RANK = 2, 16
PAUSE = 10  # seconds: a virtual machine may give free memory back to its host, and whoever fills it first pays; so each road does
SHAPES = {
    "0.8B": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 28, "num_attention_heads": 16},
    "7.6B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
}
MORE = {"num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768, "tie_word_embeddings": False}

OURS = """
import sys
from pathlib import Path
from autosloth import gguf
from autosloth.run import Run
from autosloth.settings import SFTSettings
base, out, kinds = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(",")
run = Run.create(SFTSettings(model=str(base), storage=str(base.parent), run_name="run"))
gguf.lay_source(out / "source", base, run.path("adapter"))
gguf.convert(run, out / "source", {kind: out / f"{kind}.gguf" for kind in kinds})
"""
COPY = """
import os, sys
from pathlib import Path
for path in Path(sys.argv[1]).glob("*.safetensors"):
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 24): pass
for path in Path(sys.argv[2]).glob("*.gguf"):
    with open(path, "rb", buffering=0) as file, open(Path(sys.argv[3], path.name), "wb", buffering=0) as copy:
        while part := file.read(1 << 24): copy.write(part)
        os.fsync(copy.fileno())
"""
OFFICIAL = """
import subprocess, sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from autosloth.llama import fetch_converter
base, adapter, out, kind = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out + "/merged")
AutoTokenizer.from_pretrained(base).save_pretrained(out + "/merged")
del model
converter = fetch_converter() / "convert_hf_to_gguf.py"
subprocess.run([sys.executable, converter, out + "/merged", "--outtype", kind, "--outfile", out + "/" + kind + ".gguf"], check=True)
"""


def make_model(folder: Path, shapes: dict[str, int]) -> None:
    """Fill folder/base and folder/run/adapter; the random numbers are those of one block, over and over."""
    import peft
    import torch
    import transformers

    sys.path.insert(0, str(HERE.parent / "tests"))
    from tiny_models import CHAT, byte_level

    base, adapter = folder / "base", folder / "run" / "adapter"
    config = transformers.Qwen2Config(**shapes, **MORE, architectures=["Qwen2ForCausalLM"], dtype="bfloat16")
    config.save_pretrained(base)
    tokenizer = byte_level("qwen2")
    tokenizer.chat_template = CHAT
    for place in (base, adapter):
        tokenizer.save_pretrained(place)
    with torch.device("meta"):
        weights = transformers.Qwen2ForCausalLM(config).state_dict()
    names = list(weights)
    numbers = torch.randn(1 << 27, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    shards = [names[first : first + 40] for first in range(0, len(names), 40)]
    for number, shard in enumerate(shards):
        write_shard(base / f"model-{number:05}.safetensors", {name: weights[name].shape for name in shard}, numbers)
    index = {name: f"model-{number:05}.safetensors" for number, shard in enumerate(shards) for name in shard}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    write_adapter(adapter, {name: weights[name].shape for name in names if "_proj.weight" in name}, peft.LoraConfig)


def write_shard(path: Path, shapes: dict[str, Any], numbers: Any) -> None:
    """A safetensors file written as it is made: header, then each tensor's bytes."""
    import torch

    layout, size = {}, 0
    for name, shape in shapes.items():
        layout[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [size, size + 2 * shape.numel()]}
        size += 2 * shape.numel()
    header = json.dumps(layout).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for shape in shapes.values():
            left = shape.numel()
            while left:
                part = numbers[: min(left, len(numbers))]
                file.write(part.view(torch.uint8).numpy().data)
                left -= len(part)
        os.fsync(file.fileno())


def write_adapter(folder: Path, shapes: dict[str, Any], config: Any) -> None:
    """A LoRA adapter for these weights, in float32, as PEFT saves it."""
    import torch
    from safetensors.torch import save_file

    halves, generator = {}, torch.Generator().manual_seed(1)
    for name, (rows, width) in shapes.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        halves[f"{key}.lora_A.weight"] = torch.randn(RANK, width, generator=generator) / width**0.5
        halves[f"{key}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.01
    save_file(halves, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-2] for name in shapes})
    config(r=RANK, lora_alpha=RANK, target_modules=targets, task_type="CAUSAL_LM").save_pretrained(folder)


def watched(code: str, folder: Path, result: Path, *arguments: Any) -> dict[str, float]:
    """Run a road in a process of its own from a cold base: seconds, CPU seconds, peak anonymous memory of the process that has most, peak disk beside base and result, in GB."""
    forget(folder / "base")
    time.sleep(PAUSE)
    before, started, times = used(folder), time.perf_counter(), os.times()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    memory = disk = 0.0
    while process.poll() is None:
        memory, disk = max(memory, anonymous(process.pid)), max(disk, used(folder) - before)
        time.sleep(0.05)
    seconds, after = time.perf_counter() - started, os.times()
    if process.returncode:
        sys.exit(process.stderr.read().decode())
    made = sum(path.stat().st_size for path in result.glob("*.gguf"))
    cpu = after.children_user + after.children_system - times.children_user - times.children_system
    figures = {"seconds": seconds, "cpu_seconds": cpu, "anonymous_gb": memory / GB, "extra_disk_gb": (disk - made) / GB}
    return {name: round(figure, 2) for name, figure in figures.items()}


def anonymous(process: int) -> int:
    """Bytes of memory that no file backs, of this process or a child of it, whichever has more."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        own = next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return max([own, *(anonymous(int(child)) for child in children)])


def used(folder: Path) -> int:
    """Bytes on the disk of all files in a folder."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += 512 * os.lstat(os.path.join(root, name)).st_blocks
            except FileNotFoundError:
                continue
    return total


def forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(size: str, kinds: str, official: bool) -> dict[str, Any]:
    """All roads on one model; prints and returns the figures."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model(folder, SHAPES[size])
        base, roads = folder / "base", {"ours": [], "cp": []}
        for _ in range(ROUNDS):
            for road, code in (("ours", OURS), ("cp", COPY)):
                out = folder / road
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
                arguments = [base, out, kinds] if road == "ours" else [base, folder / "ours", out]
                roads[road].append(watched(code, folder, out, *arguments))
                print(f"{size} {road:8}", roads[road][-1], flush=True)
        read, written = used(base), used(folder / "ours")
        shutil.rmtree(folder / "cp")
        if official:
            shutil.rmtree(folder / "ours")
            out = folder / "official"
            out.mkdir()
            roads["official"] = [
                watched(OFFICIAL, folder, out, base, folder / "run" / "adapter", out, kinds.split(",")[0])
            ]
            print(f"{size} official", roads["official"][-1], flush=True)
    ratios = [ours["seconds"] / copy["seconds"] for ours, copy in zip(roads["ours"], roads["cp"], strict=True)]
    print(f"{size} ours / cp: {' '.join(f'{ratio:.2f}' for ratio in ratios)} (goal: at most 2, or 60 s of CPU)")
    return {
        "types": kinds,
        "read_gb": round(read / GB, 2),
        "written_gb": round(written / GB, 2),
        "ratio": round(statistics.median(ratios), 3),
        **roads,
    }


def main() -> None:
    from autosloth.hardware import hardware, versions

    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--large", action="store_true", help="the 7.6B model in place of the small one")
    options.add_argument("--official", action="store_true", help="the official route on the 7.6B model too")
    options.add_argument("--types", default="q8_0", help="for example q8_0,q4_k_m")
    chosen = options.parse_args()
    path, size = HERE / "results" / "export.json", "7.6B" if chosen.large else "0.8B"
    results = json.loads(path.read_text()) if path.is_file() else {}
    figures = measure(size, chosen.types, chosen.official or not chosen.large)
    load = [round(figure, 1) for figure in os.getloadavg()]
    results[size] = {**figures, "hardware": hardware(), "versions": versions(), "load": load}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
