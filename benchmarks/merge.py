"""What the merged model costs: `python benchmarks/merge.py [FOLDER]`, part of `make bench`.

A model of 0.8B weights and one of 7.6B (Qwen2.5-7B's shapes) in bfloat16, both of random numbers and made here, each with
a LoRA adapter of rank 16 on all linear layers, are merged by AutoSloth; beside it, in the same run, the official way for
the small one (PEFT's merge, then save_pretrained) and `cp` of the same files. Each in a process of its own, from a cold
cache, timed after the imports until the bytes are on the disk. FOLDER (by default a temporary one) must have 40 GB free
for the large model, which is left out otherwise; all is deleted afterwards. Writes benchmarks/results/merge.json.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHARD = 2_000_000_000  # weights in a file, 4 GB
SIZES = {
    "0.8B": dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=18, num_attention_heads=20),
    "7.6B": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28),
}

HEAD = """
import json, os, sys, threading, time
from pathlib import Path
base, adapter, out = map(Path, sys.argv[1:])
anonymous = [0]
def watch():
    while True:
        with open("/proc/self/status") as status:
            held = next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
        anonymous[0] = max(anonymous[0], held)
        time.sleep(0.02)
{imports}
before = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
threading.Thread(target=watch, daemon=True).start()
started, cpu = time.perf_counter(), sum(os.times()[:4])  # with children
{work}
written, used = time.perf_counter() - started, sum(os.times()[:4]) - cpu
os.sync()
print(json.dumps(dict(seconds=time.perf_counter() - started, seconds_without_sync=written, cpu_seconds=used,
    peak_anonymous_gb=anonymous[0] * 1024 / 1e9, imports_gb=before * 1024 / 1e9)))
"""
OURS = HEAD.format(
    imports="import torch, transformers, peft\nfrom transformers import Qwen2ForCausalLM\nfrom autosloth.merge import merge_model",
    work="merge_model(base, adapter, out)",
)
OFFICIAL = HEAD.format(
    imports="import torch\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM, Qwen2ForCausalLM",
    work="""
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter)
model.merge_and_unload().save_pretrained(out)
""",
)
COPY = HEAD.format(
    imports="import subprocess",
    work='subprocess.run(["cp", *map(str, base.glob("*.safetensors")), str(out)], check=True)',
)


def make_model(folder: Path, shapes: dict[str, int]) -> None:
    """Write a model of random bfloat16 numbers in files of 4 GB, one file in memory at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(**shapes, num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False)
    config.architectures, config.dtype = ["Qwen2ForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config).state_dict()
    pool = torch.empty(1 << 24).normal_(std=0.02).bfloat16()
    files: list[dict[str, Any]] = [{}]
    for name, tensor in tensors.items():
        if sum(other.numel() for other in files[-1].values()) + tensor.numel() > SHARD:
            files.append({})
        files[-1][name] = tensor
    index = {}
    for number, held in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        filled = {
            name: pool.repeat(tensor.numel() // len(pool) + 1)[: tensor.numel()].reshape(tensor.shape)
            for name, tensor in held.items()
        }
        save_file(filled, folder / file, {"format": "pt"})
        index |= dict.fromkeys(held, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def make_adapter(folder: Path, base: Path) -> None:
    """Write a LoRA adapter of rank 16 on all linear layers, random in both halves."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    from autosloth.shards import model_shards, read_header

    LoraConfig(r=16, lora_alpha=16, target_modules=LAYERS, base_model_name_or_path=str(base)).save_pretrained(folder)
    header = {name: entry for shard in model_shards(base) for name, entry in read_header(shard).items()}
    halves = {}
    for name, entry in header.items():
        if name.split(".")[-2] in LAYERS and name.endswith(".weight"):
            rows, columns = entry["shape"]
            layer = "base_model.model." + name.removesuffix(".weight")
            halves[f"{layer}.lora_A.weight"] = torch.randn(16, columns) * 0.02
            halves[f"{layer}.lora_B.weight"] = torch.randn(rows, 16) * 0.02
    save_file(halves, folder / "adapter_model.safetensors", {"format": "pt"})


def measured(script: str, base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """Run one side in a process of its own, the base's files not in the disk's cache."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    os.sync()
    for path in base.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    result = subprocess.run([sys.executable, "-c", script, base, adapter, out], capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def differing(first: Path, second: Path) -> tuple[int, int]:
    """How many weights of two merged models differ in any bit, and how many there are."""
    from safetensors import safe_open

    from autosloth.shards import model_shards, read_header

    place = {name: path for path in model_shards(second) for name in read_header(path)}
    different = every = 0
    for path in model_shards(first):
        for name in read_header(path):
            one, other = (safe_open(at, "pt").get_tensor(name) for at in (path, place[name]))
            different, every = different + int((one != other).sum()), every + one.numel()
    return different, every


def compare(size: str, folder: Path) -> dict[str, Any]:
    """Every side for one size of model; its files are gone afterwards."""
    base, adapter, out = (folder / name for name in ("base", "adapter", "out"))
    make_model(base, SIZES[size])
    make_adapter(adapter, base)
    found: dict[str, Any] = {"gb": sum(path.stat().st_size for path in base.glob("*.safetensors")) / 1e9}
    found |= {"cp": measured(COPY, base, adapter, out), "autosloth": measured(OURS, base, adapter, out)}
    if size == "0.8B":
        found["peft"] = measured(OFFICIAL, base, adapter, folder / "peft")
        found["weights_that_differ"], found["weights"] = differing(out, folder / "peft")
    for name in ("base", "adapter", "out", "peft"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return found


def main() -> None:
    from autosloth.hardware import hardware, versions

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as folder:
        for size in SIZES:
            free = shutil.disk_usage(folder).free / 1e9
            if size == "7.6B" and free < 40:
                print(f"7.6B: left out, it needs 40 GB of disk and {free:.0f} GB are free")
                continue
            results[size] = found = compare(size, Path(folder))
            for side in ("cp", "autosloth", "peft"):
                if side in found:
                    one = found[side]
                    print(
                        f"{size} ({found['gb']:.1f} GB) {side:9}: {one['seconds']:6.1f} s on the disk, {one['seconds_without_sync']:6.1f} s written, "
                        f"{one['cpu_seconds']:6.1f} s of CPU, {one['peak_anonymous_gb']:.2f} GB of anonymous memory ({one['imports_gb']:.2f} after the imports)",
                        flush=True,
                    )
            ratio = found["autosloth"]["seconds"] / found["cp"]["seconds"]
            print(f"{size}: {ratio:.2f} times as long as cp (goal: at most 2, and 1.0 GB)", flush=True)
            if "weights" in found:
                print(
                    f"{size}: {found['weights_that_differ']} of {found['weights']} weights differ from PEFT's in any bit"
                )
    results |= {"hardware": hardware(), "versions": versions(), "load": os.getloadavg()}
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "merge.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
