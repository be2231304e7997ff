"""What the merged model costs: `python benchmarks/merge.py [FOLDER]`, part of `make bench`.

A model of 0.8B weights and one of 7.6B (Qwen2.5-7B's shapes) in bfloat16, both of random numbers and made here, each with
a LoRA adapter of rank 16 on all linear layers, are merged by AutoSloth; beside it, in turn, `cp` of the same files and, for
the small one, the official way, which is PEFT's merge, then save_pretrained (`merge_sides.py`). Each in a process of its own, from a
cold cache, timed after the imports until the bytes are on the disk. FOLDER (by default a temporary one) must have 40 GB free
for the large model, which is left out otherwise; all is deleted afterwards. Writes benchmarks/results/merge.json.
"""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

from big_models import forget, make_model
from sides import Case, by_pair, column, in_turn, keep, measure, options, spread


class Model(NamedTuple):
    """A size in `big_models.py`: how many rounds, beside which sides, and the disk that it needs, in GB."""

    size: str
    rounds: int
    sides: tuple[str, ...]
    disk_gb: float


FULL = [Model("0.8B", 5, ("cp", "autosloth", "peft"), 10), Model("7.6B", 3, ("cp", "autosloth"), 40)]
SMOKE = [Model("tiny", 1, ("cp", "autosloth", "peft"), 1)]


def merged(side: str, folder: Path) -> Case:
    """One merge of a side from a cold cache; its files take the place of the last side's, but PEFT's are compared."""
    out = folder / ("peft" if side == "peft" else "out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    forget(folder / "base")
    return measure("merge_sides.py", side, base=folder / "base", adapter=folder / "adapter", out=out)


def differing(first: Path, second: Path) -> tuple[int, int]:
    """How many weights of two merged models differ in any bit, and how many there are."""
    from safetensors import safe_open

    from autosloth.weights import model_headers

    place = {name: path for path, header in model_headers(second).items() for name in header}
    different = every = 0
    for path, header in model_headers(first).items():
        for name in header:
            one, other = (safe_open(at, "pt").get_tensor(name) for at in (path, place[name]))
            different, every = different + int((one != other).sum()), every + one.numel()
    return different, every


def compare(model: Model, folder: Path) -> Case:
    """Every side for one size of model."""
    make_model(folder / "base", folder / "adapter", model.size)
    found: Case = {"gb": sum(path.stat().st_size for path in folder.glob("base/*.safetensors")) / 1e9}
    found["runs"] = in_turn(model.rounds, {side: partial(merged, side, folder) for side in model.sides})
    if "peft" in model.sides:
        found["weights_that_differ"], found["weights"] = differing(folder / "out", folder / "peft")
    return found


def show(size: str, found: Case) -> None:
    """The figures of one size of model."""
    runs = found["runs"]
    print(f"{size} ({found['gb']:.1f} GB), {len(runs['cp'])} rounds in turn; medians, with the quartiles")
    for side, measured in runs.items():
        on_disk, written, cpu, held, imports = (
            column(measured, name) for name in ("seconds", "seconds_without_sync", "cpu_seconds", "peak_anonymous_gb", "imports_gb")
        )  # fmt: skip
        times = (
            f"{spread(on_disk, 1, ' s')} on the disk, {spread(written, 1, ' s')} written, {spread(cpu, 1, ' s')} of CPU"
        )
        print(f"  {side:9} {times}, {max(held):.2f} GB of anonymous memory ({max(imports):.2f} after the imports)")
    ratios = by_pair(column(runs["autosloth"], "seconds"), column(runs["cp"], "seconds"))
    print(f"  autosloth / cp, pair by pair: {spread(ratios)} (goal: at most 2, and 1.0 GB)")
    if "weights" in found:
        print(f"  {found['weights_that_differ']} of {found['weights']} weights differ from PEFT's in any bit")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="where the models are made")
    asked, results = parser.parse_args(), {}
    for model in SMOKE if asked.smoke else FULL:
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            free = shutil.disk_usage(folder).free / 1e9
            if free < model.disk_gb:
                print(f"{model.size}: left out, it needs {model.disk_gb} GB of disk and {free:.0f} GB are free")
                continue
            results[model.size] = compare(model, Path(folder))
            show(model.size, results[model.size])
    keep("merge", results, asked.smoke)


if __name__ == "__main__":
    main()
