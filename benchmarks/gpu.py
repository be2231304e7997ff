"""Speed and memory on a GPU, beside the peers, on models of random weights in true shapes: `python benchmarks/gpu.py [ROW ...]`, all rows by default.

Needs no network. Each side of a row runs in a process of its own on the same rows: (a) transformers, peft and trl alone, (b) Unsloth and trl
as Unsloth's public notebooks call them, (c) AutoSloth with its defaults. A row takes minutes and can be run alone; what it measured goes
into benchmarks/results/gpu.json under its name. Without a GPU every row runs at a tiny size, which shows that it works and measures nothing:
it prints "not measured", and never takes the place of a measurement. `--smoke` does so anywhere, for the row `sft` by default, and keeps nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import generate
from sides import HERE, by_pair, command, options, quartiles, spread, told

from autosloth.hardware import first_gpu

T4_GB = 15.0  # what a T4's torch may take
STEPS, PAIRS = 12, 5
AS_ASKED = {"batch_size": 2, "gradient_accumulation": 1}  # a step of one batch, with nothing to choose
TINY = {"load_in_4bit": False, "max_length": 256, "lora_r": 4, "lora_alpha": 4, "optimizer": "adamw_torch_fused"}
FULL = {"answer": 6500, "spread": 0.1}  # every row longer than max_length, to be cut there
FULL_PAIRS = {"prompt": 300, "answer": 1400}
MEMORY_SHAPES = {  # what is estimated and measured: (road, model, in 4 bit, settings)
    "mistral-7b, 2 x 2048": ("sft", "mistral-7b", True, {"batch_size": 2, "max_length": 2048}),
    "mistral-7b, 8 x 1024": ("sft", "mistral-7b", True, {"batch_size": 8, "max_length": 1024}),
    "llama-3.1-8b, 2 x 2048": ("sft", "llama-3.1-8b", True, {"batch_size": 2, "max_length": 2048}),
    "llama-3.2-3b, 4 x 2048": ("sft", "llama-3.2-3b", True, {"batch_size": 4, "max_length": 2048}),
    "llama-3.2-1b in 16 bit, 2 x 4096": ("sft", "llama-3.2-1b", False, {"batch_size": 2, "max_length": 4096}),
    "mistral-7b, DPO, 4 x 1024": ("dpo", "mistral-7b", True, {"profile": "a100", "batch_size": 4}),
}


class Line(NamedTuple):
    """A line of the table; met is None where no goal stands beside the figure, or nothing was measured."""

    what: str
    value: str
    goal: str = ""
    met: bool | None = None


class Bench:
    """Runs sides: on the GPU that is here, or tiny where there is none or only a smoke test is asked for."""

    def __init__(self, scratch: Path, smoke: bool = False):
        self.gpu, self.scratch, self.runs = None if smoke else first_gpu(), scratch, {}

    def prepared(
        self, name: str, model: str, road: str = "sft", four_bit: bool = True, rows: int = 2000, head: str = "random",
        lengths: dict[str, float] | None = None, **settings: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """A run folder with its rows, on a model that is made for it."""
        if not self.gpu:
            model, four_bit, rows, settings = "tiny", False, 160, {**settings, **TINY, "precision": "auto"}
        make = {"shape": model, "four_bit": four_bit, "head": head, "dtype": "bfloat16" if self.gpu else "float32"}
        case = {"folder": str(self.scratch), "model": f"{model}-{head}-{'nf4' if four_bit else '16'}", "make": make, "road": road}  # fmt: skip
        case |= {"rows": rows, "name": name, "lengths": lengths or {}, "settings": {"load_in_4bit": four_bit, **settings}}  # fmt: skip
        return self.side("prepare", {}, **case, gpu_gb=self.gpu.memory_gb if self.gpu else 16.0)

    def side(self, side: str, prepared: dict[str, Any], **case: Any) -> dict[str, Any]:
        """What one side gave; {"failed": the end of what it said} where it did not come to its end."""
        case = {"side": side, "run": prepared.get("run"), "steps": STEPS if self.gpu else 3, **case}
        paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        environment |= {"UNSLOTH_COMPILE_LOCATION": str(self.scratch / "compiled"), "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(
            command("gpu_sides.py", **case), capture_output=True, text=True, env=environment, cwd=self.scratch
        )
        found = told(result.returncode, result.stdout)
        if found is not None:
            return found
        if side == "prepare":
            sys.exit(result.stdout + result.stderr)
        end = [line for line in result.stderr.splitlines() if line.strip()][-1:] or [f"exit status {result.returncode}"]
        print(f"{side}: {result.stderr[-3000:]}", file=sys.stderr)
        return {"failed": end[0][:300]}

    def measure(self, name: str, side: str, prepared: dict[str, Any], **case: Any) -> dict[str, Any]:
        """What a side gave, kept under a name for the results."""
        self.runs[name] = self.side(side, prepared, **case)
        return self.runs[name]


# ----------------------------------------------------------------------------------------------------------------- rows
def sft(bench: Bench) -> list[Line]:
    """A step of SFT, Mistral-7B in NF4, length 2048."""
    prepared = bench.prepared("sft", "mistral-7b", max_length=2048)
    sides = three_sides(bench, prepared)
    lines = [training_line(f"SFT, 7B NF4, length 2048: {name}", run, "tokens") for name, run in sides.items()]
    lines.append(ratio_line("  (c) beside (b), tokens/s", sides, "tokens_per_second", 1.5))
    lines += trial_lines(sides["(c) AutoSloth"])
    two = bench.measure("(c) AutoSloth, batch 2", "autosloth", prepared, changed=AS_ASKED)
    return [*lines, limit_line("  peak VRAM of (c) at batch 2", two, 9.0)]


def profile(bench: Bench) -> list[Line]:
    """Where the time of a step goes, (b) and (c), by torch's profiler; the steps are slower under it."""
    prepared, lines = bench.prepared("profile", "mistral-7b", max_length=2048), []
    for name, side in {"(b) Unsloth's notebook": "notebook", "(c) AutoSloth": "autosloth"}.items():
        run = bench.measure(name, side, prepared, steps=6, profiled=True)
        if "failed" in run:
            lines.append(Line(f"profile: {name}", f"failed: {run['failed']}", "", False))
            continue
        spent = run["profile"]
        busy = (
            f"step {spent['step_s']:.2f} s, host {spent['cpu']['busy_s']:.2f} s, GPU {spent['device']['busy_s']:.2f} s"
        )
        lines.append(Line(f"profile: {name}", busy))
        for where in ("device", "cpu") if bench.gpu else ():
            lines += [Line(f"  {where}: {key[:50]}", f"{seconds:.3f} s, {calls} calls") for key, seconds, calls in spent[where]["top"]]  # fmt: skip
    return lines


def sft_t4(bench: Bench) -> list[Line]:
    """The same in fp16 under a cap, as on a T4 (its memory; its speed is another matter)."""
    prepared = bench.prepared("sft-t4", "mistral-7b", max_length=2048, precision="float16")
    sides = three_sides(bench, prepared, cap_gb=T4_GB)
    lines = [training_line(f"the same, fp16, cap of {T4_GB:.0f} GB: {name}", run, "tokens") for name, run in sides.items()]  # fmt: skip
    lines += trial_lines(sides["(c) AutoSloth"])
    return [*lines, limit_line("  peak VRAM of (c), 3 GB to spare", sides["(c) AutoSloth"], T4_GB - 3)]


def losses(bench: Bench) -> list[Line]:
    """Whether (a) and (c) have the same losses, step by step, on the same batches."""
    prepared = bench.prepared("losses", "mistral-7b", max_length=2048, **AS_ASKED)
    ours = bench.measure("(c) AutoSloth", "autosloth", prepared, changed={"packing": False})
    theirs = bench.measure("(a) plain", "plain", prepared)
    if "failed" in ours or "failed" in theirs:
        return [Line("losses of (a) and (c)", "failed", "within 1e-2", False)]
    if ours["batches"] != theirs["batches"]:
        return [Line("losses of (a) and (c)", "the batches differ, so nothing is compared", "within 1e-2", None)]
    apart = max(abs(a - c) / a for a, c in zip(theirs["losses"], ours["losses"], strict=True))
    return [Line(f"losses of (a) and (c), {len(ours['losses'])} steps", f"at most {apart:.1e} apart", "within 1e-2", apart <= 1e-2)]  # fmt: skip


def dpo(bench: Bench) -> list[Line]:
    """A step of DPO, 7B, length 1024."""
    prepared = bench.prepared("dpo", "mistral-7b", road="dpo", profile="a100")
    sides = three_sides(bench, prepared, notebook="notebook_dpo")
    lines = [training_line(f"DPO, 7B NF4, length 1024: {name}", run, "rows") for name, run in sides.items()]
    lines += trial_lines(sides["(c) AutoSloth"])
    return [*lines, ratio_line("  (c) beside (b), pairs/s", sides, "rows_per_second", 1.3)]


def dpo_t4(bench: Bench) -> list[Line]:
    """DPO in the profile for a T4 under its cap."""
    prepared = bench.prepared("dpo-t4", "mistral-7b", road="dpo", profile="t4")
    run = bench.measure("(c) AutoSloth", "autosloth", prepared, cap_gb=T4_GB)
    what = f"DPO, 7B NF4, profile t4, cap of {T4_GB:.0f} GB: (c) AutoSloth"
    return [training_line(what, run, "rows"), limit_line("  peak VRAM of (c)", run, T4_GB)]


def generation(bench: Bench, name: str, shape: str, four_bit: bool) -> list[Line]:
    """Greedy answers in AutoSloth's batches, in left-padded ones, and one by one."""
    size = generate.Size(prompts=192, rounds=3, shape=shape) if bench.gpu else generate.SMOKE
    make = {
        "shape": size.shape,
        "four_bit": four_bit and bench.gpu is not None,
        "dtype": "bfloat16" if bench.gpu else "float32",
    }
    case = {
        "folder": str(bench.scratch),
        "model": f"{size.shape}-counting-{'nf4' if make['four_bit'] else '16'}",
        "make": make,
    }
    case["size"] = asdict(size)
    run = bench.measure("(c) AutoSloth beside generate", "generation", {}, **case)
    if "failed" in run:
        return [Line(f"generation, {name}", f"failed: {run['failed']}", "", False)]
    ours, padded, single = run["tokens_per_second"].values()
    what = f"{spread(ours, 0)} tokens/s; left-padded {spread(padded, 0)}, one by one {spread(single, 0)}"
    return [
        Line(f"generation, {name}", what),
        faster_line("  beside left-padded batches", by_pair(ours, padded), 3),
        faster_line("  beside one by one", by_pair(ours, single), 10),
    ]


def spin(bench: Bench) -> list[Line]:
    """A whole round of self-play, 1B, 1,000 prompts, by part."""
    settings = {"rounds": 1, "prompts_per_round": 1000} if bench.gpu else {"rounds": 1, "prompts_per_round": 16, "max_new_tokens": 16}  # fmt: skip
    prepared = bench.prepared("spin", "tinyllama-1.1b", road="spin", head="ending", **settings)
    run = bench.measure("(c) AutoSloth", "spin_round", prepared, steps=0)
    if "failed" in run:
        return [Line("SPIN round, 1B", f"failed: {run['failed']}", "", False)]
    told = ", ".join(f"{part} {seconds / 60:.1f}" for part, seconds in run["seconds"].items())
    made, trained = run["seconds"]["generation"], run["seconds"]["training"]
    return [
        Line("SPIN round, 1B, 1,000 prompts, minutes", f"{told}; {run['pairs']['pairs']} pairs"),
        Line("  generation beside training", f"{made / trained:.2f} x", "at most 1 x", made <= trained),
    ]


def overhead(bench: Bench) -> list[Line]:
    """AutoSloth beside Unsloth and TRL with the same arguments and rows: PAIRS runs each, in turn."""
    prepared, same = bench.prepared("overhead", "tinyllama-1.1b", max_length=1024, **AS_ASKED), True
    pairs: list[tuple[float, float]] = []
    for number in range(PAIRS if bench.gpu else 1):
        ours, theirs = (
            bench.measure(f"{side} {number}", side, prepared, steps=30 if bench.gpu else 3, changed={"packing": False})
            for side in ("autosloth", "bare")
        )
        if "failed" in ours or "failed" in theirs:
            return [Line("overhead per step, 1B NF4", "failed", "at most 1.02 x", False)]
        pairs.append((ours["step_s"], theirs["step_s"]))
        same &= ours["batches"] == theirs["batches"]
    ratios, note = by_pair(*zip(*pairs, strict=True)), "" if same else "; the batches differ"
    met = quartiles(ratios)[1] <= 1.02 and same
    return [Line("overhead per step, 1B NF4", f"{spread(ratios, 3)} x{note}", "at most 1.02 x", met)]


def memory(bench: Bench, shapes: list[str]) -> list[Line]:
    """What `autosloth check` expects of memory beside what is measured, for rows as long as max_length."""
    return [memory_line(bench, name, *MEMORY_SHAPES[name]) for name in (shapes if bench.gpu else shapes[-1:])]


def memory_line(bench: Bench, name: str, road: str, model: str, four_bit: bool, settings: dict[str, Any]) -> Line:
    """One shape's estimate beside its measured peak."""
    lengths, number = FULL_PAIRS if road == "dpo" else FULL, list(MEMORY_SHAPES).index(name)
    prepared = bench.prepared(f"memory-{number}", model, road, four_bit, rows=128, lengths=lengths, **settings)
    run = bench.measure(name, "autosloth", prepared, steps=3, changed={"gradient_accumulation": 1})
    run["expected"] = prepared["expected"]
    if "failed" in run:
        return Line(f"VRAM, {name}", f"failed: {run['failed']}", "", False)
    expected, measured = sum(part["gb"] for part in run["expected"]), run["peak_vram_gb"]
    error = expected / measured - 1 if measured else 0.0
    told = f"{expected:.1f} GB expected, {measured or 0:.1f} measured: {error:+.0%}"
    return Line(f"VRAM, {name}", told, "within 15 %", abs(error) <= 0.15)


def backoff(bench: Bench) -> list[Line]:
    """The training stage where the first batch does not fit: it is to go on with as many rows a step."""
    batch, steps, length = (32, 6, 2048) if bench.gpu else (8, 3, TINY["max_length"])
    settings = {"batch_size": batch, "gradient_accumulation": 1, "max_length": length, "max_steps": steps}
    prepared = bench.prepared("backoff", "tinyllama-1.1b", rows=400, lengths=FULL, **settings)
    gb = [part["gb"] for part in prepared["expected"]]  # the last is what the batch takes
    cap = sum(gb) - 0.5 * gb[-1]  # half of the batch or less should fit
    run = bench.measure("(c) AutoSloth", "whole_training", prepared, steps=steps, cap_gb=cap)
    run["cap_gb"] = cap
    what, goal = f"batch of {batch} x {length}, cap of {cap:.1f} GB", "goes on, same rows a step"
    if "failed" in run or "stopped" in run:
        return [Line(what, run.get("stopped") or f"failed: {run['failed']}", goal, False)]
    a_step, fitted = run["tokens"] / (run["steps"] * length), run["facts"].get("batch_size", batch)
    went_on = run["steps"] == steps and a_step == batch and fitted < batch
    return [Line(what, f"{run['steps']} steps of {a_step:.1f} rows, {fitted} at once", goal, went_on)]


SMALL = [name for name in MEMORY_SHAPES if not name.startswith("mistral-7b")]
LARGE = [name for name in MEMORY_SHAPES if name.startswith("mistral-7b")]
ROWS: dict[str, Callable[[Bench], list[Line]]] = {  # each is meant to take less than ten minutes, its models included
    "sft": sft,
    "profile": profile,
    "sft-t4": sft_t4,
    "losses": losses,
    "dpo": dpo,
    "dpo-t4": dpo_t4,
    "generation-7b": partial(generation, name="7B NF4", shape="mistral-7b", four_bit=True),
    "generation-1b": partial(generation, name="1B 16 bit", shape="tinyllama-1.1b", four_bit=False),
    "spin": spin,
    "overhead": overhead,
    "memory-7b": partial(memory, shapes=LARGE),
    "memory-others": partial(memory, shapes=SMALL),
    "backoff": backoff,
}


# ---------------------------------------------------------------------------------------------------------------- lines
def three_sides(bench: Bench, prepared: dict[str, Any], notebook: str = "notebook", **case: Any) -> dict[str, Any]:
    """The two peers and AutoSloth on the same rows."""
    sides = {"(a) plain": "plain", "(b) Unsloth's notebook": notebook, "(c) AutoSloth": "autosloth"}
    if not bench.gpu and notebook == "notebook_dpo":
        del sides["(a) plain"]  # trl 1.15's loss is a Triton kernel, which a machine without a GPU lacks
    return {name: bench.measure(name, side, prepared, **case) for name, side in sides.items()}


def training_line(what: str, run: dict[str, Any], unit: str) -> Line:
    """How fast a side trained, and what memory it took."""
    if "failed" in run:
        return Line(what, f"failed: {run['failed']}")
    speed = f"{run[f'{unit}_per_second']:.{0 if unit == 'tokens' else 2}f} {'pairs' if unit == 'rows' else unit}/s"
    return Line(what, f"{speed}, step {run['step_s']:.2f} s, {run['peak_vram_gb'] or 0:.1f} GB VRAM, padding {run['padding']:.0%}")  # fmt: skip


def trial_lines(run: dict[str, Any]) -> list[Line]:
    """What the first minutes of a training found, without the GGUF's head, and how long they took."""
    if not (tried := run.get("trial")):
        return []
    how = "with" if tried["gradient_checkpointing"] else "without"
    found = f"{tried['seconds']:.0f} s; {tried['batch_size']} at once, {how} gradient checkpointing, {tried['longest_gb']:.1f} GB VRAM"
    return [Line("  trial of (c)", found, "at most 120 s", tried["seconds"] <= 120)]


def ratio_line(what: str, sides: dict[str, Any], key: str, goal: float) -> Line:
    """AutoSloth beside Unsloth's notebook."""
    ours, theirs = sides["(c) AutoSloth"].get(key), sides["(b) Unsloth's notebook"].get(key)
    if not ours or not theirs:
        return Line(what, "a side failed", f"at least {goal} x", False)
    return Line(what, f"{ours / theirs:.2f} x", f"at least {goal} x", ours >= goal * theirs)


def faster_line(what: str, ratios: list[float], goal: float) -> Line:
    """How many times as fast, pair by pair."""
    return Line(what, f"{spread(ratios)} x", f"at least {goal} x", quartiles(ratios)[1] >= goal)


def limit_line(what: str, run: dict[str, Any], limit_gb: float) -> Line:
    """Peak memory under a limit."""
    peak = run.get("peak_vram_gb")
    return Line(what, f"{peak or 0:.1f} GB", f"at most {limit_gb:.0f} GB", "failed" not in run and (peak or 0) <= limit_gb)  # fmt: skip


def show(lines: list[Line], measured: bool) -> None:
    """Print lines of the table; of a smoke test no figure."""
    for what, value, goal, met in lines:
        verdict = {True: "yes", False: "NO", None: ""}[met] if measured else ""
        print(f"{what:62} {value if measured else 'not measured':60} {goal:26} {verdict}".rstrip(), flush=True)


def keep(path: Path, row: str, result: dict[str, Any]) -> None:
    """Put a row's result into the results file, unless it would replace a measurement by a smoke test."""
    every = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if every.get(row, {}).get("measured") and not result["measured"]:
        print(f"  {row}: the measurement in {path.name} stays", flush=True)
        return
    every[row] = result
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")


def result_of(bench: Bench, lines: list[Line]) -> dict[str, Any]:
    """A row's result with what it was measured on; a smoke test keeps which sides came to their end, and no figure."""
    if not bench.gpu:
        ended = {name: "failed" if "failed" in run else "ran" for name, run in bench.runs.items()}
        return {"measured": False, "note": "not measured: a smoke test without a GPU", "sides": ended}
    told = {"measured": True, "time": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    table = [line._asdict() for line in lines]
    return told | {"table": table, "runs": bench.runs, **bench.side("machine", {})}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"one of {', '.join(ROWS)}")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "gpu.json", help="where the results go")
    parser.add_argument("--scratch", type=Path, help="folder for models, which is kept; a temporary one by default")
    asked = parser.parse_args()
    if unknown := set(asked.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    with tempfile.TemporaryDirectory() as temporary:
        scratch, failed = asked.scratch or Path(temporary), False
        scratch.mkdir(parents=True, exist_ok=True)
        for row in asked.rows or (["sft"] if asked.smoke else ROWS):
            bench = Bench(scratch.resolve(), asked.smoke)
            lines = ROWS[row](bench)
            show(lines, bench.gpu is not None)
            if not asked.smoke:
                keep(asked.results, row, result_of(bench, lines))
            failed |= any("failed" in run for run in bench.runs.values())
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
