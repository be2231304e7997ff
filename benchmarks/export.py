"""What the export costs beside the official route and beside copying the same bytes: `python benchmarks/export.py`, part of `make bench`.

Makes a bfloat16 model of random weights with Qwen 2's real vocabulary and a LoRA adapter (rank 16, all linear layers) in a
temporary folder ($TMPDIR). Then, in one run on one disk, in turn: our export to Q8_0; `cp` of as many bytes, which is every byte
of the base read and every byte of the result written and synced; and at last the official route, which is PEFT's merge on
the CPU, `save_pretrained` and llama.cpp's converter (`export_sides.py`). The base is dropped from the page cache some seconds before each.
`--large` takes the 7.6B model (Qwen2.5-7B's shapes: 32 GB of disk); `--official` runs the official route on that too (16 GB of RAM).
Writes benchmarks/results/export.json.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from big_models import anonymous, forget, make_model
from sides import HERE, Case, by_pair, column, command, in_turn, keep, options, spread, told

GB = 1e9


@dataclass(frozen=True)
class Size:
    """The model's size in `big_models.py`, how many rounds, and the pause before each side, in seconds.

    A virtual machine may give free memory back to its host, and whoever fills it first pays; so each side does.
    """

    model: str
    rounds: int = 5
    pause: float = 10


SMALL, LARGE, SMOKE = Size("0.8B"), Size("7.6B"), Size("tiny", rounds=1, pause=0)


def write_tokenizer(*folders: Path) -> None:
    """Qwen 2's, as llama.cpp's converter knows it."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from support.tiny_models import CHAT, byte_level

    tokenizer = byte_level("qwen2")
    tokenizer.chat_template = CHAT
    for folder in folders:
        tokenizer.save_pretrained(folder)


def exported(side: str, folder: Path, kinds: list[str], pause: float) -> Case:
    """One export of a side, into its own folder."""
    out = folder / side
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    forget(folder / "base")
    time.sleep(pause)
    case = {"base": folder / "base", "adapter": folder / "run" / "adapter", "made": folder / "autosloth"}
    figures = watched(command("export_sides.py", side, **case, out=out, kinds=kinds), folder, out)
    print(f"  {side}: {figures}", file=sys.stderr, flush=True)
    return figures


def watched(side: list[str], folder: Path, out: Path) -> Case:
    """What a process takes: seconds, CPU seconds; in GB the most anonymous memory of it or a child, and disk besides."""
    before, started, times = used(folder), time.perf_counter(), os.times()
    memory = disk = 0.0
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(side, stdout=said, stderr=errors)
        while process.poll() is None:
            memory, disk = max(memory, anonymous(process.pid)), max(disk, used(folder) - before)
            time.sleep(0.05)
        seconds, after = time.perf_counter() - started, os.times()
        said.seek(0), errors.seek(0)
        if told(process.returncode, said.read()) is None:
            sys.exit(errors.read())
    made = sum(path.stat().st_size for path in out.glob("*.gguf"))
    cpu = after.children_user + after.children_system - times.children_user - times.children_system
    figures = {"seconds": seconds, "cpu_seconds": cpu, "anonymous_gb": memory / GB, "extra_disk_gb": (disk - made) / GB}
    return {name: round(figure, 2) for name, figure in figures.items()}


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


def compare(size: Size, kinds: list[str], official: bool) -> Case:
    """All sides on one model."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model(folder / "base", folder / "run" / "adapter", size.model)
        write_tokenizer(folder / "base", folder / "run" / "adapter")
        run = partial(exported, folder=folder, kinds=kinds, pause=size.pause)
        runs = in_turn(size.rounds, {side: partial(run, side) for side in ("autosloth", "cp")})
        found = {"types": kinds, "read_gb": used(folder / "base") / GB, "written_gb": used(folder / "autosloth") / GB}
        if official:
            shutil.rmtree(folder / "cp")  # room for its copy of the model
            runs["official"] = [run("official")]
    return {**found, "runs": runs, "ratios": by_pair(*(column(runs[side], "seconds") for side in ("autosloth", "cp")))}


def show(size: Size, found: Case) -> None:
    """The figures of one model."""
    moved = f"{found['read_gb']:.1f} GB read and {found['written_gb']:.1f} written"
    print(f"{size.model}, {moved}, {size.rounds} rounds in turn; medians, with the quartiles")
    for side, runs in found["runs"].items():
        times = f"{spread(column(runs, 'seconds'), 1, ' s')}, {spread(column(runs, 'cpu_seconds'), 1, ' s')} of CPU"
        memory, disk = max(column(runs, "anonymous_gb")), max(column(runs, "extra_disk_gb"))
        print(f"  {side:9} {times}, {memory:.2f} GB of anonymous memory, {disk:.2f} GB of disk besides")
    print(f"  autosloth / cp, pair by pair: {spread(found['ratios'])} (goal: at most 2, or 60 s of CPU)")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--large", action="store_true", help="the 7.6B model in place of the small one")
    parser.add_argument("--official", action="store_true", help="the official route on the 7.6B model too")
    parser.add_argument("--types", default="q8_0", help="for example q8_0,q4_k_m")
    asked = parser.parse_args()
    size = SMOKE if asked.smoke else LARGE if asked.large else SMALL
    found = compare(size, asked.types.split(","), asked.official or size is not LARGE)
    show(size, found)
    keep("export", found, asked.smoke, part=size.model)


if __name__ == "__main__":
    main()
