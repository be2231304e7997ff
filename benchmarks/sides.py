"""What the benchmarks share: sides in processes of their own and in turn, medians with quartiles, ratios pair by pair, where results go.

A file such as `sft_sides.py` holds sides, and `python benchmarks/sft_sides.py '{"side": "plain", ...}'` runs one; what it measured is its last
line, JSON behind MARK. `--smoke` asks a benchmark for its tiny form: the same code in seconds, which shows that it works and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

Case = dict[str, Any]
Figures = TypeVar("Figures")
HERE = Path(__file__).parent
RESULTS = HERE / "results"
MARK = "RESULT "
SAME_LOSS = 1e-3
LOAD_BEFORE = os.getloadavg()  # of the last 1, 5 and 15 minutes, before the benchmark adds its own


def options(text: str | None) -> argparse.ArgumentParser:
    """A parser of the command line that knows `--smoke`, for a benchmark with this docstring."""
    parser = argparse.ArgumentParser(description=(text or "").splitlines()[0])
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes: shows in seconds that it works, keeps no figure"
    )
    return parser


# ---------------------------------------------------------------------------------------------------------------- sides
def play(sides: Iterable[Callable[..., Case]]) -> None:
    """Run the side that the command line names, and tell what it measured."""
    case = json.loads(sys.argv[1])
    tell({side.__name__: side for side in sides}[case.pop("side")](**case))


def tell(result: Case) -> None:
    """Print what a side measured, for `told`."""
    print(f"\n{MARK}{json.dumps(result)}", flush=True)


def told(status: int, output: str) -> Case | None:
    """What a side told, by its exit status and what it printed; None where it did not come to its end."""
    lines = [line for line in output.splitlines() if line.startswith(MARK)]
    return json.loads(lines[-1].removeprefix(MARK)) if lines and status == 0 else None


def command(file: str, side: str, **case: Any) -> list[str]:
    """What runs a side of this file."""
    return [sys.executable, str(HERE / file), json.dumps({"side": side, **case}, default=str)]


def measure(file: str, side: str, **case: Any) -> Case:
    """What a side measures in a fresh process, in a fresh `folder` unless given one; its failure ends the benchmark."""
    with tempfile.TemporaryDirectory() as fresh:
        process = subprocess.run(command(file, side, **{"folder": fresh, **case}), capture_output=True, text=True)
    result = told(process.returncode, process.stdout)
    if result is None:
        sys.exit(f"{side} failed:\n{process.stdout}{process.stderr}")
    return result


def in_turn(rounds: int, sides: dict[str, Callable[[], Figures]]) -> dict[str, list[Figures]]:
    """What each side measured, round by round: whatever else the machine does falls on all of them alike."""
    runs: dict[str, list[Figures]] = {side: [] for side in sides}
    for number in range(1, rounds + 1):
        for side, run in sides.items():
            figures = run()
            runs[side].append(figures)
            told = f"{figures:.4g}" if isinstance(figures, float) else "done"
            print(f"round {number} of {rounds}: {side}: {told}", file=sys.stderr, flush=True)
    return runs


# -------------------------------------------------------------------------------------------------------------- figures
def column(runs: list[Case], name: str) -> list[float]:
    """A figure of every run."""
    return [run[name] for run in runs]


def by_pair(ones: list[float], others: list[float]) -> list[float]:
    """The ratio of two sides' figures, round by round."""
    return [one / other for one, other in zip(ones, others, strict=True)]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    import numpy

    low, middle, high = numpy.percentile(values, [25, 50, 75])
    return float(low), float(middle), float(high)


def spread(values: list[float], digits: int = 2, unit: str = "") -> str:
    """The median with the quartiles, in words.

    >>> spread([4.0, 1.0, 2.0], 1, " s")
    '2.0 s (1.5 to 3.0)'
    """
    low, middle, high = quartiles(values)
    return f"{middle:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"


def losses_apart(runs: dict[str, list[Case]]) -> float:
    """How far the losses of two sides are apart at most, as a share; more than SAME_LOSS ends the benchmark."""
    one, other = (measured[0]["losses"] for measured in runs.values())
    apart = max(abs(ours - theirs) / theirs for ours, theirs in zip(one, other, strict=True))
    if apart > SAME_LOSS:
        sys.exit(f"The losses are up to {apart:.1e} apart: the sides did not train the same.")
    return apart


# -------------------------------------------------------------------------------------------------------------- results
def keep(name: str, results: Case, smoke: bool, part: str = "") -> None:
    """Write results/<name>.json, or one part of it, with what it was measured on; of a smoke test nothing."""
    if smoke:
        print("smoke test: tiny sizes, the figures mean nothing, and none is kept")
        return
    from autosloth.hardware import hardware, versions

    path = RESULTS / f"{name}.json"
    results = {**results, "hardware": hardware(), "versions": versions()}
    results |= {"load_before": LOAD_BEFORE, "load": os.getloadavg()}
    if part:
        results = {**(json.loads(path.read_text()) if path.is_file() else {}), part: results}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
