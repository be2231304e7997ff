"""What preparing data costs: `python benchmarks/data.py [ALPACA.json]`, part of `make bench`.

50,000 rows of Alpaca's form are read, recognised, brought into one form, tokenised, labelled and split by AutoSloth, beside
the official approach: `datasets.map` for the format and SFTTrainer for the tokens, as Unsloth's Alpaca notebook does it, which
learns whole rows; the same with answers told apart by train_on_responses_only, as its chat notebooks do it; and the least that can
be done, two bare `datasets.map` calls on all cores (`data_sides.py`). Each in a process of its own, with an empty cache,
timed after the imports. Without a file the rows are made from the demo's stories. Then chats of 50 tool calls each, beside a bare
`apply_chat_template` and the tokenizer over the same chats, which tells no answers apart; and a million short rows once, for the memory that they take.
Writes benchmarks/results/data.json.
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
TRACES = {"autosloth": "autosloth", "plain": "bare template and tokenizer"}
CALLS = 50  # in a chat


@dataclass(frozen=True)
class Size:
    """How many rows are prepared, how many of them held out, and how often."""

    rows: int
    held_out: int
    rounds: int
    traces: int  # chats of tool calls
    many: int  # short rows


FULL = Size(rows=50_000, held_out=500, rounds=5, traces=2_000, many=1_000_000)
SMOKE = Size(rows=200, held_out=20, rounds=1, traces=20, many=2_000)


def write_input(path: Path, source: Path | None, count: int) -> None:
    """So many different rows of Alpaca's form, from a file (repeated) or as long as Alpaca's."""
    if source is None:
        return write_instructions(path, count)
    rows = json.loads(source.read_text(encoding="utf-8"))
    every = (rows[number % len(rows)] for number in range(count))
    made = [{**row, "instruction": f"{row['instruction']} ({number})"} for number, row in enumerate(every)]
    path.write_text(json.dumps(made), encoding="utf-8")


def write_traces(path: Path, count: int) -> None:
    """So many chats of CALLS calls, no two alike, as JSON Lines."""
    tools = [{"type": "function", "function": {"name": name, "description": f"Tells the {name}.", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}} for name in ("weather", "time")]  # fmt: skip
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            turns = [{"role": "user", "content": f"Plan trip {number}, please, city by city."}]
            for i in range(CALLS):
                call = {"name": ("weather", "time")[i % 2], "arguments": {"city": f"City {i} of trip {number}"}}
                turns.append(
                    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
                )
                turns.append({"role": "tool", "content": f"It is {i} there, as always on trip {number}."})
            turns.append({"role": "assistant", "content": f"Trip {number} is planned."})
            file.write(json.dumps({"messages": turns, "tools": tools}) + "\n")


def write_short(path: Path, count: int) -> None:
    """So many short rows, no two alike, as JSON Lines."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(json.dumps({"question": f"What is {number} + 1?", "answer": f"It is {number + 1}."}) + "\n")


def show(runs: dict[str, list[Case]], names: dict[str, str]) -> None:
    """A line for each side: its time, and how many times AutoSloth's that is, pair by pair."""
    ours = column(runs["autosloth"], "seconds")
    for side, measured in runs.items():
        times, last = column(measured, "seconds"), measured[-1]
        print(
            f"  {names[side]:30} {spread(times, 1, ' s')}, {spread(by_pair(times, ours))} x AutoSloth's; {last['rows']:,} rows,"
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
        chats, short = Path(folder, "traces.jsonl"), Path(folder, "short.jsonl")
        write_traces(chats, size.traces)
        case = {"rows": chats, "held_out": size.held_out, "calls": True}
        traces = in_turn(size.rounds, {side: partial(measure, "data_sides.py", side, **case) for side in TRACES})
        write_short(short, size.many)
        many = measure("data_sides.py", "autosloth", rows=short, held_out=size.held_out)
    print(f"{size.rows:,} rows, {size.rounds} rounds in turn; medians, with the quartiles")
    show(runs, SIDES)
    print(f"{size.traces:,} chats of {CALLS} tool calls, {size.rounds} rounds in turn")
    show(traces, TRACES)
    print(f"{size.many:,} short rows, once: {many['seconds']:.0f} s, {many['peak_ram_gb']:.2f} GB RAM at most")
    source = asked.source.name if asked.source else "made"
    figures = {"rows": size.rows, "source": source, "runs": runs, "traces": size.traces, "runs_of_traces": traces}
    keep("data", figures | {"many": size.many, "run_of_many": many}, asked.smoke)


if __name__ == "__main__":
    main()
