"""What runs survive, counted: `python benchmarks/faults.py`, part of `make bench`.

The tests that kill runs, let the Hub misbehave or give bad input are run, slow ones too, and counted by what each tried; then all that they left
on the disk, and all that they printed, is searched for the tokens that they published with. Writes benchmarks/results/faults.json.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from sides import HERE, Case, keep, options

TESTS = HERE.parent / "tests"
SECRET = b"Zq7x" * 8  # of which the tests make their tokens (tests/support/publishing.py)
KINDS = {  # marker -> what is tried, what is hoped for
    "kill": ("kills", "survived"),
    "hub_fault": ("Hub faults", "survived"),
    "bad_input": ("bad inputs", "answered with a sentence"),
}
SMOKE = {"kill": "test_kills.py", "hub_fault": "test_hub_faults.py", "bad_input": "test_settings.py"}


def run_tests(marker: str, folder: Path, smoke: bool) -> tuple[list[ElementTree.Element], str]:
    """The tests of a kind, two at once, their files in `folder`: their reports (JUnit's test cases), and what they printed."""
    where = [TESTS / SMOKE[marker]] if smoke else [TESTS]
    wanted = f"{marker} and not slow" if smoke else marker
    pytest = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-m", wanted, f"--basetemp={folder / 'tests'}"]
    report = folder / "report.xml"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [*pytest, f"--junitxml={report}", *where]
    done = subprocess.run(command, cwd=HERE.parent, env=clean, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # 1: some failed
        sys.exit(f"The tests of `{marker}` could not be run:\n{done.stdout}{done.stderr}")
    return list(ElementTree.parse(report).iter("testcase")), done.stdout


def counted(case: ElementTree.Element) -> tuple[int, int]:
    """How many of what a test tries it tried, and how many of them went well; one, where it tells nothing."""
    told = {each.get("name"): int(each.get("value") or 0) for each in case.iter("property")}
    failed = case.find("failure") is not None or case.find("error") is not None
    tried = told.get("tried", 1)
    return tried, 0 if failed and "survived" not in told else told.get("survived", tried)


def tokens_in(folder: Path, printed: str) -> int:
    """How many files that the tests left hold a token that they published with; what was printed counts as one."""
    left = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(SECRET in path.read_bytes() for path in left) + (SECRET in printed.encode())


def measure(marker: str, smoke: bool) -> Case:
    """Tried, survived, and the tokens found in what a kind of tests left."""
    with tempfile.TemporaryDirectory() as folder:
        cases, printed = run_tests(marker, Path(folder), smoke)
        run = [case for case in cases if case.find("skipped") is None]
        tried, survived = (sum(each) for each in zip(*map(counted, run), strict=True)) if run else (0, 0)
        return {"tests": len(run), "tried": tried, "survived": survived, "tokens": tokens_in(Path(folder), printed)}


def main() -> None:
    """Run, print the table, keep it."""
    smoke = options(__doc__).parse_args().smoke
    found = {marker: measure(marker, smoke) for marker in KINDS}
    print("| tried | of them | found |\n|---|---|---|")
    for marker, (what, hoped) in KINDS.items():
        print(f"| {what} {hoped} | {found[marker]['tried']} | {found[marker]['survived']} |")
    print(f"| tokens found in what they left | - | {sum(each['tokens'] for each in found.values())} |")
    keep("faults", found, smoke)


if __name__ == "__main__":
    main()
