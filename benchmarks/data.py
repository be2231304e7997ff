"""What preparing data costs: `python benchmarks/data.py [ALPACA.json]`, part of `make bench`.

50,000 rows of Alpaca's form are read, recognised, brought into one form, tokenised, labelled and split by AutoSloth, beside
the official approach: `datasets.map` for the format and SFTTrainer for the tokens, as Unsloth's Alpaca notebook does it, which
learns whole rows; the same with answers told apart by train_on_responses_only, as its chat notebooks do it; and the least that can
be done, two bare `datasets.map` calls on all cores (`data_sides.py`). Each in a process of its own, with an empty cache,
timed after the imports. Without a file the rows are made from the demo's stories. Writes benchmarks/results/data.json.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gpu_models import write_instructions
from sides import Case, by_pair, column, in_turn, keep, measure, options, spread

SIDES = {  # functions in data_sides.py
    "autosloth": "autosloth",
    "two_maps": "two datasets.map, whole rows",
    "trl": "trl, whole rows learnt",
    "trl_answers": "trl + unsloth, answers learnt",
}


@dataclass(frozen=True)
class Size:
    """How many rows are prepared, how many of them held out, and how often."""

    rows: int
    held_out: int
    rounds: int


FULL = Size(rows=50_000, held_out=500, rounds=5)
SMOKE = Size(rows=200, held_out=20, rounds=1)


def write_input(path: Path, source: Path | None, count: int) -> None:
    """So many different rows of Alpaca's form, from a file (repeated) or as long as Alpaca's."""
    if source is None:
        return write_instructions(path, count)
    rows = json.loads(source.read_text(encoding="utf-8"))
    every = (rows[number % len(rows)] for number in range(count))
    made = [{**row, "instruction": f"{row['instruction']} ({number})"} for number, row in enumerate(every)]
    path.write_text(json.dumps(made), encoding="utf-8")


def show(runs: dict[str, list[Case]]) -> None:
    """A line for each side: its time, and how many times AutoSloth's that is, pair by pair."""
    ours = column(runs["autosloth"], "seconds")
    for side, measured in runs.items():
        times, last = column(measured, "seconds"), measured[-1]
        print(
            f"  {SIDES[side]:30} {spread(times, 1, ' s')}, {spread(by_pair(times, ours))} x AutoSloth's; {last['rows']:,} rows,"
            f" {last['tokens']:,} tokens, {last['learnt']:,} learnt, {last['peak_ram_gb']:.2f} GB RAM at most"
        )


def main() -> None:
    parser = options(__doc__)
    parser.add_argument(
        "source", nargs="?", type=Path, metavar="ALPACA.json", help="rows to take in place of made ones"
    )
    asked = parser.parse_args()
    size = SMOKE if asked.smoke else FULL
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.json")
        write_input(rows, asked.source, size.rows)
        case = {"rows": rows, "held_out": size.held_out}
        runs = in_turn(size.rounds, {side: partial(measure, "data_sides.py", side, **case) for side in SIDES})
    print(f"{size.rows:,} rows, {size.rounds} rounds in turn; medians, with the quartiles")
    show(runs)
    source = asked.source.name if asked.source else "made"
    keep("data", {"rows": size.rows, "source": source, "runs": runs}, asked.smoke)


if __name__ == "__main__":
    main()
