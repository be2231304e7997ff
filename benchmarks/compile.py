"""What compiling llama.cpp behind a training costs it, by niceness: `python benchmarks/compile.py`, part of `make bench`.

For stretches of time llama.cpp's own C++ files are compiled, as many at once as ninja takes by itself on two cores, beside one and beside
two processes that compute without a pause: a training on a GPU keeps one core so, and the making of its data two. In turn at each niceness
and without the compiler. Measured are the pace of the busy processes, as a share of theirs without the compiler, the CPU seconds that the
compiler gets in a second, and what other work on the machine takes of it. Nothing here starts a session of its own: where Linux groups
processes by session (sched_autogroup_enabled), a niceness counts inside one only. Writes benchmarks/results/compile.json.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil
from sides import Case, by_pair, column, in_turn, keep, options, quartiles, spread

from autosloth.export.llama import fetch_source

CORES = os.cpu_count() or 2
COMPILER = ("c++", "-std=c++17", "-O3", "-fPIC", "-c", "-o", "/dev/null")
INCLUDED = ("include", "src", "ggml/include")
WHOLE = 232  # CPU seconds, for all that AutoSloth has compiled of llama.cpp
ALONE = "no compiler"


@dataclass(frozen=True)
class Size:
    """Rounds, the seconds of a stretch and those that the compiler has before it, each side's niceness, files at once."""

    rounds: int = 3
    seconds: float = 3
    before: float = 1
    niceness: tuple[int, ...] = (0, 5, 10, 19)
    jobs: int = CORES + 1


SMOKE = Size(rounds=1, seconds=1, niceness=(0, 19))


# ---------------------------------------------------------------------------------------------------------- processes
def compute(seconds: float) -> tuple[float, float]:
    """A process that computes without a pause: its pace, in turns of a loop in a second, and its CPU seconds."""
    turns, started, cpu = 0, time.perf_counter(), time.process_time()
    while (passed := time.perf_counter() - started) < seconds:
        turns += sum(1 for _ in range(10_000))
    return turns / passed, time.process_time() - cpu


@contextlib.contextmanager
def compiling(folder: Path, niceness: int, jobs: int) -> Iterator[psutil.Process]:
    """llama.cpp's files are compiled meanwhile, so many at once."""
    files = [*sorted(folder.glob("src/*.cpp")), *sorted(folder.glob("src/models/*.cpp"))]
    command = ["nice", "-n", str(niceness), "xargs", "-n1", f"-P{jobs}", *COMPILER]
    with tempfile.TemporaryFile("w+") as listed:
        listed.write("\n".join(map(str, files)))
        listed.seek(0)
        process = subprocess.Popen(
            [*command, *(f"-I{folder / part}" for part in INCLUDED)], stdin=listed, process_group=0
        )
        try:
            yield psutil.Process(process.pid)
            assert process.poll() is None, "the compiler came to its end before the stretch did"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def cpu_seconds(process: psutil.Process) -> float:
    """Of a process and all that came of it, whether it still runs or was waited for."""
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(one.cpu_times()[:4])
    return total


def used() -> float:
    """CPU seconds of all that ran on this machine."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq


# ---------------------------------------------------------------------------------------------------------- stretches
def stretch(pool: ProcessPoolExecutor, busy: int, size: Size, folder: Path, niceness: int | None) -> Case:
    """The pace of the busy processes, and the CPU seconds in a second of the compiler and of others; niceness None: no compiler."""
    with contextlib.ExitStack() as stack:
        compiler = None if niceness is None else stack.enter_context(compiling(folder, niceness, size.jobs))
        time.sleep(size.before)
        started, before, ours = time.perf_counter(), used(), cpu_seconds(compiler) if compiler else 0.0
        paces, cpu = zip(*pool.map(compute, [size.seconds] * busy), strict=True)
        passed = time.perf_counter() - started
        compiled = (cpu_seconds(compiler) if compiler else 0.0) - ours
        return {
            "pace": sum(paces),
            "compiler": compiled / passed,
            "others": (used() - before - sum(cpu) - compiled) / passed,
        }


def compare(size: Size, folder: Path, busy: int) -> dict[str, list[Case]]:
    """Every niceness in turn beside so many busy processes."""
    with ProcessPoolExecutor(busy) as pool:
        run = partial(stretch, pool, busy, size, folder)
        every = {ALONE: None, **{f"nice {one}": one for one in size.niceness}}
        return in_turn(size.rounds, {side: partial(run, one) for side, one in every.items()})


def show(size: Size, busy: int, runs: dict[str, list[Case]]) -> None:
    """The figures beside so many busy processes."""
    print(
        f"{busy} busy on {CORES} cores, {size.jobs} files at once, {size.rounds} rounds in turn; medians, with the quartiles"
    )
    for side, measured in runs.items():
        pace = [100 * share for share in by_pair(column(measured, "pace"), column(runs[ALONE], "pace"))]
        got, others = column(measured, "compiler"), column(measured, "others")
        whole = WHOLE / 60 / max(quartiles(got)[1], 1e-3)
        compiler = "" if side == ALONE else f", compiler {spread(got)} CPU s a second: {whole:.0f} min for all"
        print(f"  {side:11} pace {spread(pace, 0, ' %')}{compiler}, others {spread(others)}")


def unpacked(folder: Path) -> Path:
    """llama.cpp's source, fetched and unpacked into a folder."""
    with tarfile.open(fetch_source(folder)) as tar:
        tar.extractall(folder, filter="data")
    return next(folder.glob("*/vendor/llama.cpp"))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--jobs", type=int, default=CORES + 1, help="files compiled at once")
    asked = parser.parse_args()
    size, results = replace(SMOKE if asked.smoke else Size(), jobs=asked.jobs), {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = unpacked(Path(temporary))
        for busy in (1, 2):
            results[f"{busy} busy"] = compare(size, folder, busy)
            show(size, busy, results[f"{busy} busy"])
    keep("compile", {"whole_cpu_seconds": WHOLE, "runs": results}, asked.smoke, part=f"{asked.jobs} at once")


if __name__ == "__main__":
    main()
