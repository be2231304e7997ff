"""What the road of supervised fine-tuning costs: `python benchmarks/sft.py`, part of `make bench`.

Prints the demo road by stage, the import of `autosloth`, and a training step beside the same model and rows
trained by a plain script of Unsloth and TRL (`sft_sides.py`), whose losses must agree. Writes benchmarks/results/sft.json.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sides import Case, by_pair, column, in_turn, keep, losses_apart, measure, options, spread

SETTINGS = {"batch_size": 16, "gradient_accumulation": 1, "learning_rate": 2e-3, "warmup": 10, "max_length": 256}


@dataclass(frozen=True)
class Size:
    """How often and how long: pairs of trainings of so many steps, pairs of imports, and how the demo road is set."""

    pairs: int
    steps: int
    imports: int
    road: Case


FULL = Size(pairs=5, steps=60, imports=9, road={})
SMOKE = Size(pairs=1, steps=4, imports=1, road={"max_steps": 2, "eval_rows": 8, "eval_answers": 0, "quantizations": []})


def trained(side: str, steps: int) -> Case:
    """One training of a side: seconds of a step, and the losses."""
    told = measure("sft_sides.py", side, steps=steps, settings=SETTINGS)
    return {name: told[name] for name in ("step_s", "steps_s", "losses")}


def seconds_of(code: str) -> float:
    """The wall time of an interpreter that runs this code."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - started


def import_ms(pairs: int) -> float:
    """Median wall time of `import autosloth.cli` beyond that of a bare interpreter, in ms."""
    codes = {"import autosloth.cli": "import autosloth.cli", "a bare interpreter": "pass"}
    ours, bare = in_turn(pairs, {name: partial(seconds_of, code) for name, code in codes.items()}).values()
    return 1000 * statistics.median(one - other for one, other in zip(ours, bare, strict=True))


def demo_stages(settings: Case) -> dict[str, float]:
    """Seconds of each stage of the demo road, run anew by the command line."""
    with tempfile.TemporaryDirectory() as folder:
        where = {"model": "demo", "dataset": "demo", "storage": folder, "run_name": "demo"}
        given = [part for name, value in {**where, **settings}.items() for part in ("--set", f"{name}={value}")]
        result = subprocess.run([sys.executable, "-m", "autosloth", "sft", *given], capture_output=True, text=True)
        if result.returncode:
            sys.exit(result.stderr)
        marks = sorted(Path(folder, "demo", ".done").glob("*.json"), key=lambda path: path.stat().st_mtime)
        return {path.stem: json.loads(path.read_text())["seconds"] for path in marks}


def main() -> None:
    from autosloth.demo import demo_base

    smoke = options(__doc__).parse_args().smoke
    size = SMOKE if smoke else FULL
    demo_base()
    stages = demo_stages(size.road)
    told = ", ".join(f"{name} {seconds:.1f}" for name, seconds in stages.items())
    print(f"demo road, seconds by stage: {told} (sum {sum(stages.values()):.1f})", flush=True)
    imported = import_ms(size.imports)
    print(f"import autosloth.cli: {imported:.0f} ms (goal: under 300 ms)", flush=True)
    runs = in_turn(size.pairs, {side: partial(trained, side, size.steps) for side in ("autosloth", "plain")})
    apart = losses_apart(runs)
    print(f"a step of training, {size.pairs} pairs of runs in turn; medians, with the quartiles")
    for side, measured in runs.items():
        print(f"  {side:9} {spread([1000 * seconds for seconds in column(measured, 'step_s')], 1, ' ms')}")
    ratios = by_pair(*(column(measured, "step_s") for measured in runs.values()))
    print(
        f"  autosloth / plain, pair by pair: {spread(ratios, 3)} (goal: at most 1.03); losses at most {apart:.1e} apart"
    )
    keep(
        "sft",
        {"stages_s": stages, "import_ms": round(imported, 1), "runs": runs, "ratios": ratios, "losses_apart": apart},
        smoke,
    )


if __name__ == "__main__":
    main()
