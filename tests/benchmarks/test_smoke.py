"""Every benchmark runs in its tiny form, and leaves the results of its true form alone; ratios are taken pair by pair."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIDES = {  # what each prints a figure of
    "sft.py": ["autosloth", "plain"],
    "dpo.py": ["autosloth", "random"],
    "data.py": ["autosloth", "two datasets.map", "trl, whole rows", "trl + unsloth"],
    "generate.py": ["autosloth", "left-padded batches", "one by one"],
    "spin.py": ["self-play", "plain SFT"],
    "merge.py": ["cp", "autosloth", "peft"],
    "export.py": ["autosloth", "cp", "official"],
    "compile.py": ["no compiler", "nice 0", "nice 19"],
    "faults.py": ["kills", "Hub faults", "bad inputs", "tokens found"],
    "gpu.py": ["(a) plain", "(b) Unsloth's notebook", "(c) AutoSloth"],
}
ROWS = ["profile", "dpo", "generation-1b", "spin", "overhead", "memory-others", "backoff"]  # gpu.py's other sides


def kept():
    """The files that a benchmark writes, with their content."""
    files = [*(ROOT / "benchmarks" / "results").iterdir(), ROOT / "docs" / "spin.png"]
    return {path: path.read_bytes() for path in files}


def smoke(name, *arguments, folder):
    command = [sys.executable, str(ROOT / "benchmarks" / name), "--smoke", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_make_bench_runs_every_benchmark_that_is_tested_here():
    run = re.findall(r"^\t\$\(BIN\)/python benchmarks/(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert sorted(run) == sorted(SIDES)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIDES)
def test_a_benchmark_runs_and_keeps_nothing_in_its_tiny_form(name, base, tmp_path):
    before, result = kept(), smoke(name, folder=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    for side in SIDES[name]:
        line = rf"^(  |\| |.*: ){re.escape(side)}.* (\d|not measured)"
        assert re.search(line, result.stdout, re.MULTILINE), (side, result.stdout)
    assert "the figures mean nothing" in result.stdout or "not measured" in result.stdout
    assert kept() == before and list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_the_gpus_benchmark_runs_in_its_tiny_form(row, base, tmp_path):
    before, result = kept(), smoke("gpu.py", row, folder=tmp_path)
    assert result.returncode == 0 and "not measured" in result.stdout, result.stdout + result.stderr
    assert "failed" not in result.stdout and kept() == before


def test_a_ratio_is_taken_pair_by_pair_so_that_a_slow_moment_does_not_show(benchmarks):
    import sides

    ours, theirs = [2.0, 200.0, 2.2, 2.0, 1.8], [1.0, 100.0, 1.0, 1.0, 1.0]
    assert sides.by_pair(ours, theirs) == [2.0, 2.0, 2.2, 2.0, 1.8]
    assert sides.spread(sides.by_pair(ours, theirs)) == "2.00 (2.00 to 2.00)"
    assert sides.quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)
    with pytest.raises(ValueError):
        sides.by_pair([1.0], [1.0, 2.0])


def test_the_sides_take_turns(benchmarks):
    import sides

    heard = []
    runs = sides.in_turn(2, {name: lambda name=name: heard.append(name) or len(heard) for name in ("one", "other")})
    assert heard == ["one", "other", "one", "other"] and runs == {"one": [1, 3], "other": [2, 4]}


def test_a_side_that_fails_ends_the_benchmark_with_what_it_said(benchmarks, monkeypatch, tmp_path):
    import sides

    (tmp_path / "some_sides.py").write_text("import sys\nprint('half a word')\nsys.exit('no memory')\n")
    monkeypatch.setattr(sides, "HERE", tmp_path)
    with pytest.raises(SystemExit, match=r"plain failed:\nhalf a word\nno memory"):
        sides.measure("some_sides.py", "plain")


def test_results_are_kept_whole_or_by_part_and_never_of_a_smoke_test(benchmarks, monkeypatch, tmp_path):
    import sides

    monkeypatch.setattr(sides, "RESULTS", tmp_path)
    sides.keep("sft", {"ratio": 9}, smoke=True)
    assert list(tmp_path.iterdir()) == []
    sides.keep("sft", {"ratio": 1}, smoke=False)
    found = json.loads((tmp_path / "sft.json").read_text())
    assert found["ratio"] == 1 and {"hardware", "versions", "load_before", "load"} <= set(found)
    sides.keep("export", {"ratio": 1}, smoke=False, part="0.8B")
    sides.keep("export", {"ratio": 2}, smoke=False, part="7.6B")
    found = json.loads((tmp_path / "export.json").read_text())
    assert {size: each["ratio"] for size, each in found.items()} == {"0.8B": 1, "7.6B": 2} and found["7.6B"]["versions"]
