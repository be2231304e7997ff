"""The preview of the data as the model will see it: rows with the learnt tokens marked, lengths, counts, and how many steps follow."""

from __future__ import annotations

import math
from itertools import groupby
from pathlib import Path
from typing import Any

from ..distributed import processes
from ..models import TEMPLATE, load_tokenizer
from ..output import render_html, show
from ..run import Run, read_json, write_json, write_text
from ..settings import Settings
from ..values import is_hub_id
from .clean import UNUSED
from .encode import IGNORED

BINS = 40  # of the histogram of lengths
ROWS, TOKENS, IN_TEXT = 3, 600, 150  # rows that are shown, and the most tokens of each as HTML and as text
LOOKED_AT = 200  # rows among which a cut one and one of several turns are looked for
BAR = 40  # characters


def show_preview(run: Run) -> None:
    """Show the prepared data, as HTML in a notebook and as text elsewhere, and write data/preview.html."""
    facts, settings, rows = run.facts["data"], run.settings, rows_to_show(run)
    view = {"facts": facts, "settings": settings, "rows": rows, "plan": plan(facts["train_rows"], settings)}
    paths = [part["path"] for part in settings.parts]
    view["dataset"] = " + ".join(path if is_hub_id(path) else Path(path.partition("?")[0]).name for path in paths)
    view |= {"axis": axis(facts["length"], settings.max_length), "examples": examples(run)}
    html = render_html("data/templates/preview.html.j2", **view)
    write_text(
        run.path("data", "preview.html"),
        f'<!doctype html><meta charset="utf-8"><title>{settings.run_name}</title>\n{html}',
    )
    show(as_text(view), html)


def examples(run: Run) -> list[tuple[str, str]]:
    """What was changed, left out or not used, in words, each with the first such row or value."""
    kept, facts = read_json(run.path("data", "examples.json")), run.facts["data"]
    names = [
        (f"{verb}: {name.replace('_', ' ')}", name) for verb in ("changed", "dropped") for name in facts.get(verb, {})
    ]
    names += [(f"not used: {name or 'a column without a name'}", f"{UNUSED}{name}") for name in facts.get("unused", [])]
    return [(done, kept[name]) for done, name in names if name in kept]


def rows_to_show(run: Run) -> list[dict[str, Any]]:
    """The rows of the preview as `as_tokens` gives them; kept in data/preview.json, so that to show them again takes no tokenizer."""
    kept, settings = run.path("data", "preview.json"), run.settings
    if not kept.is_file():
        tokenizer = load_tokenizer(settings, run.path(TEMPLATE))
        sides = [side for row in chosen_rows(run.path("data", "train.parquet"), settings) for side in sides_of(row)]
        write_json(kept, {"rows": [as_tokens(tokenizer, side, settings.max_length) for side in sides]})
    return read_json(kept)["rows"]


def histogram(lengths: list[int], max_length: int) -> dict[str, Any]:
    """`width` of a bin in tokens and `rows` in each of BINS bins from 0 on; the last one holds all longer rows too.

    The axis ends near the 99th percentile, or at max_length where that is not far beyond.
    """
    import numpy

    end = float(numpy.percentile(lengths, 99))
    width = math.ceil((max(end, max_length * 1.02) if max_length < 1.5 * end else end * 1.05) / BINS) or 1
    counts = numpy.bincount(numpy.minimum(numpy.array(lengths) // width, BINS - 1), minlength=BINS)
    return {"width": width, "rows": counts.tolist()}


def axis(length: dict[str, Any], max_length: int) -> dict[str, Any]:
    """How to draw the histogram: bars as (from, to, rows, height in %), and where max_length stands on the axis in %, or None beyond it."""
    width, rows = length["histogram"]["width"], length["histogram"]["rows"]
    bars = [(i * width, (i + 1) * width - 1, count, 100 * count / max(rows)) for i, count in enumerate(rows)]
    limit = 100 * max_length / (width * BINS)
    return {"bars": bars, "end": width * BINS, "limit": limit if limit <= 100 else None}


def plan(rows: int, settings: Settings) -> dict[str, Any]:
    """Optimizer steps that follow from the rows, as transformers' Trainer counts them: `steps`, `per_epoch`, `per_step`, `epochs`, whether rows are `packed`, and what is to be said of the `warmup`."""
    rounds = settings.rounds if settings.road == "spin" else 1
    asked = min(rows, settings.prompts_per_round) if settings.road == "spin" else rows
    per_epoch = math.ceil(math.ceil(asked / processes()) / settings.rows_per_step)
    steps = settings.max_steps or math.ceil(settings.epochs * per_epoch)
    full, rest = divmod(steps, per_epoch)
    per_step, packed = settings.rows_per_step * processes(), settings.road == "sft" and settings.packing
    return {
        "steps": rounds * steps,
        "per_epoch": per_epoch,
        "per_step": per_step,
        "epochs": round(full + min(1, rest * per_step / asked), 2),  # the last step of an epoch may have fewer rows
        "packed": packed,
        "warmup": settings.shorter_warmup(steps),
    }


def chosen_rows(path: Path, settings: Settings) -> list[dict[str, Any]]:
    """ROWS of the first rows, among them one that was cut and the one of most answers, where there are such."""
    import pyarrow.parquet

    batch = next(pyarrow.parquet.ParquetFile(path).iter_batches(LOOKED_AT))
    rows = batch.to_pylist()
    cut = [row for row in rows if len(row["input_ids"]) >= settings.max_length][:1]
    most = max(rows, key=lambda row: sum(learnt for learnt, _ in groupby(label != IGNORED for label in row["labels"])))
    chosen = [rows[0], most, *cut, *rows]
    return list({row["text"]: row for row in chosen}.values())[:ROWS]


def sides_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """What is shown of a row: itself; of a pair the prompt with each of its answers."""
    if "rejected_ids" not in row:
        return [row | {"kind": "learnt"}]
    labels = [IGNORED] * len(row["prompt_ids"]) + row["rejected_ids"]
    return [row | {"kind": "chosen"}, {"text": row["rejected_text"], "labels": labels, "kind": "rejected"}]


def as_tokens(tokenizer: Any, row: dict[str, Any], max_length: int) -> dict[str, Any]:
    """A row for showing: `tokens` as (text, kind), of at most TOKENS tokens, with the counts `length`, `learnt`, `hidden`.

    kind: `given`, what the row's own `kind` calls its answers (`learnt`, `chosen`, `rejected`), `cut`, and with ` special` after it for the tokenizer's own tokens. Text is taken from where the
    token stands in the row's text, so that nothing is lost or invented; characters of several tokens are shown with the first.
    """
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    encoded = tokenizer.backend_tokenizer.encode(row["text"], add_special_tokens=False)
    tokens, shown = [], 0
    labels = row["labels"] + [IGNORED] * (len(encoded.ids) - len(row["labels"]))  # what follows an end token
    for position, (token, (_, end)) in enumerate(zip(encoded.ids[:TOKENS], encoded.offsets, strict=False)):
        kind = "cut" if position >= max_length else "given" if labels[position] == IGNORED else row["kind"]
        tokens.append((row["text"][shown:end], kind + (" special" if token in special else "")))
        shown = max(shown, end)
    learnt = sum(label != IGNORED for label in row["labels"])
    counts = {"length": len(encoded.ids), "learnt": learnt, "hidden": len(encoded.ids) - len(tokens)}
    return {"tokens": tokens, "kind": row["kind"], **counts}


def as_text(view: dict[str, Any]) -> str:
    """The preview for a terminal."""
    facts, settings, steps = view["facts"], view["settings"], view["plan"]
    share = 100 * facts["learnt_tokens"] / facts["train_tokens"]
    lines = [
        f"data: {facts['learnt_tokens']:,} of {facts['train_tokens']:,} tokens per epoch are learnt ({share:.0f} %)"
    ]
    lines += [f"data: {steps['steps']:,} steps of {steps['per_step']} rows follow: {steps['epochs']} epochs"]
    lines += [f"data: {steps['warmup']}"] if steps["warmup"] else []
    lines += [f"data: lengths in tokens: median {facts['length']['median']}, 95 % at most {facts['length']['p95']}, longest {facts['length']['longest']}"]  # fmt: skip
    lines += histogram_lines(view["axis"]["bars"], settings.max_length)
    lines += [f"data: {done}, for example {row[:IN_TEXT]}{' ...' if len(row) > IN_TEXT else ''}" for done, row in view["examples"]]  # fmt: skip
    for row in view["rows"][:2]:
        lines.append(f"data: a row of {row['length']} tokens, {row['learnt']} of them {row['kind']}:")
        for kind, tokens in groupby(row["tokens"][:IN_TEXT], key=lambda token: token[1].split()[0]):
            lines += [f"  {kind:8} | {line}" for line in "".join(text for text, _ in tokens).splitlines()]
        if row["length"] > IN_TEXT:
            lines.append(f"           | ... {row['length'] - IN_TEXT} more tokens")
    return "\n".join(lines)


def histogram_lines(bars: list[tuple[int, int, int, float]], max_length: int) -> list[str]:
    """The histogram as text, four bins a line, up to the last one that is not empty; the line of max_length is marked."""
    groups = [bars[i : i + 4] for i in range(0, len(bars), 4)]
    totals = [sum(rows for _, _, rows, _ in group) for group in groups]
    filled = max(i for i, total in enumerate(totals) if total) + 1
    lines = []
    for group, total in list(zip(groups, totals, strict=True))[:filled]:
        first, last = group[0][0], group[-1][1]
        mark = " < max_length" if first <= max_length <= last else ""
        lines.append(f"  {first:>6} to {last:<6} {'#' * math.ceil(BAR * total / max(totals)):{BAR}} {total:,}{mark}")
    return lines
