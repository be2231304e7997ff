"""The tuned model and its base answer the same questions greedily; what came of it goes to facts.json."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from ..data import Findings, report_readings, streams
from ..errors import DataError
from ..models import TEMPLATE, Decoding, answer, checked, encode_prompt, load_model, load_tokenizer, refuse_without_gpu
from ..output import counted, interval, say
from ..run import Run, known_hash, not_finished, refuse_altered
from ..settings import SFTSettings
from ..values import is_address, is_hub_id, last_part, public_address
from .bootstrap import CONFIDENCE, FEW, RESAMPLES, intervals
from .metrics import METRICS, Metric, NotScored

ANSWERS_AT_ONCE = 8  # that are generated together, where these are found to be the same as one by one
SCORES = "scores"  # in facts.json
TOO_LONG, NO_QUESTION = "too long to be answered", "without a question"


def score(run: Run, data: str, metric: str, max_new_tokens: int | None = None) -> None:
    """Answer every question of a data file with the run's model and with its base, and record both scores with their intervals.

    data: a file, folder or address as `dataset` takes it; metric: one of METRICS; max_new_tokens: as the run's by default.
    Raises SettingsError, DataError, ModelError.
    """
    refuse_unready(run)
    left = Counter()
    rows, found = questions(run, data, left)
    longest = max_new_tokens or run.settings.max_new_tokens
    said = answers(run, rows, longest, left)
    scored, wrong = scores_of(said, METRICS[metric], left)
    left = +left  # without what was none
    if not scored:
        raise DataError(f"Of the {found.read} rows of {public(data)} none can be scored ({listed(left)}).", "Choose another metric, or correct the rows.")  # fmt: skip
    path = Path(data).expanduser()
    entry = {
        **{"file": public(data), "sha256": known_hash(path) if path.is_file() else None, "metric": metric},
        **{"rows": found.read, "scored": len(scored), "few": len(scored) < FEW, "learnt": learnt(run, rows)},
        **{"left_out": dict(left), "rows_left_out": wrong},
        **intervals([row["base"] for row in scored], [row["tuned"] for row in scored], run.settings.seed),
        **{"confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": run.settings.seed, "max_new_tokens": longest},
        **{f"{who}_cut": sum(row[f"{who}_cut"] for row in scored) for who in ("base", "tuned")},
        "adapter": known_hash(run.path("adapter", "adapter_model.safetensors")),
    }
    record(run, entry)
    for line in told(entry):
        say(line)


def refuse_unready(run: Run) -> None:
    """Raises SettingsError where the run is not trained or its adapter was altered, ModelError where its model needs a GPU and there is none."""
    if run.mark("train") is None:
        raise not_finished(run, "train")
    refuse_altered(run, "train")
    refuse_without_gpu(run.settings)


def load_tuned(run: Run, longest: int | None = None) -> tuple[SFTSettings, Any, Any]:
    """The settings with the run's adapter, its tokenizer and its model, for so many tokens at most, by default as many as it was trained for. Raises ModelError."""
    settings = run.settings.model_copy(
        update={"adapter": str(run.path("adapter")), "max_length": longest or run.settings.max_length}
    )
    return settings, load_tokenizer(settings, run.path(TEMPLATE)), load_model(settings)


def public(data: str) -> str:
    """What a data file is called where others read it: its name, of an address without what may be a key, or its Hub id."""
    return data if is_hub_id(data) else last_part(public_address(data) if is_address(data) else data)


def questions(run: Run, data: str, left: Counter) -> tuple[list[dict[str, Any]], Findings]:
    """The rows of a data file as chats that end with the expected answer; what is left out is counted. Raises DataError."""
    given = {"model": run.settings.model, "dataset": data, "duplicates": "keep", "seed": run.settings.seed}
    settings = SFTSettings.from_values(given, "`--data`")
    found = Findings()
    rows, held_out = streams(settings, found)
    rows = list(rows if held_out is None else held_out)
    report_readings(found)
    left.update(found.dropped)
    asked = [row for row in rows if row.get("messages")]
    left[NO_QUESTION] += len(rows) - len(asked)
    return asked, found


def answers(run: Run, rows: list[dict[str, Any]], longest: int, left: Counter) -> list[dict[str, Any]]:
    """Of each row its number in the file, the `expected` answer and those of `tuned` and `base`, both greedy, and whether they were cut. Raises ModelError."""
    settings, tokenizer, model = load_tuned(run)
    asked = [(row, encode_prompt(tokenizer, row["messages"][:-1], row.get("tools"))) for row in rows]
    fitting = [(row, prompt) for row, prompt in asked if len(prompt) <= settings.max_length]
    left[TOO_LONG] += len(asked) - len(fitting)
    prompts = [prompt for _, prompt in fitting]
    said = [{"number": row["number"], "expected": row["messages"][-1]["content"]} for row, _ in fitting]
    for who in ("tuned", "base") if prompts else ():
        with speaking(model, who):
            decoding = checked(model, tokenizer, prompts, Decoding(longest, batch_size=ANSWERS_AT_ONCE))
            given = answer(model, tokenizer, prompts, decoding)
        for row, ids in zip(said, given, strict=True):
            row |= {who: tokenizer.decode(ids, skip_special_tokens=True), f"{who}_cut": len(ids) >= longest}
    return said


def speaking(model: Any, who: str) -> contextlib.AbstractContextManager:
    """The model with its adapter, or, as `base`, without."""
    return model.disable_adapter() if who == "base" else contextlib.nullcontext()


def scores_of(said: list[dict[str, Any]], metric: Metric, left: Counter) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows that can be scored, with the scores in place of the answers, and the numbers of those that cannot."""
    scored, wrong = [], []
    for row in said:
        try:
            scored.append(row | {who: metric(row[who], row["expected"]) for who in ("base", "tuned")})
        except NotScored as reason:
            left[str(reason)] += 1
            wrong.append(row["number"])
    return scored, wrong


def learnt(run: Run, rows: list[dict[str, Any]]) -> int:
    """How many of these rows the run was trained on, word for word."""
    trained = {json.dumps(turns_of(chat)) for chat in run.rows("train")["messages"] if chat}
    return sum(json.dumps(turns_of(row["messages"])) in trained for row in rows)


def turns_of(chat: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Who says what in a chat."""
    return [(turn["role"], turn.get("content") or "") for turn in chat]


def record(run: Run, entry: dict[str, Any]) -> None:
    """Keep a score in facts.json, in place of one of the same file by the same metric, and of those of an adapter that is no more."""

    def same(other: dict[str, Any]) -> bool:
        return all(other[name] == entry[name] for name in ("file", "sha256", "metric"))

    kept = [other for other in run.facts.get(SCORES, []) if other["adapter"] == entry["adapter"] and not same(other)]
    run.put(SCORES, [*kept, entry])


def told(entry: dict[str, Any]) -> list[str]:
    """What a score says, a line each."""
    lines = [
        f"score: {entry['metric']} of {counted(entry['scored'], 'row')} of {entry['file']} ({entry['confidence']:.0%} intervals, bootstrap of {entry['resamples']:,})"
    ]
    for who, name in (("base", "base model"), ("tuned", "tuned model"), ("difference", "difference")):
        cut = entry.get(f"{who}_cut")
        lines.append(
            f"  {name:<12} {interval(entry[who], signed=who == 'difference')}"
            + (f"; {counted(cut, 'answer')} cut at {entry['max_new_tokens']} tokens" if cut else "")
        )
    if entry["few"]:
        lines.append("  of so few questions an interval is narrower than it should be")
    if entry["learnt"]:
        lines.append(
            f"  {counted(entry['learnt'], 'row')} of the file were trained on: what they show is not how the model does on new ones"
        )
    if entry["left_out"]:
        rows = entry["rows_left_out"]
        first = (
            f"; rows {', '.join(map(str, rows[:10]))}{' ...' if len(rows) > 10 else ''} cannot be scored"
            if rows
            else ""
        )
        lines.append(f"  left out: {listed(Counter(entry['left_out']))}{first}")
    return lines


def listed(left: Counter) -> str:
    """What was left out, by reason."""
    return (
        ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in left.items() if count) or "no row is left"
    )
