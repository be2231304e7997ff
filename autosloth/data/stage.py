"""The data stage: load, clean, split, tokenise and label the rows, and write them as the trainer takes them."""

from __future__ import annotations

import itertools
import math
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError, ModelError, StorageError
from ..hardware import GB
from ..models import TEMPLATE, chosen_template, embedding_rows, end_ids, held_date, load_tokenizer, own_template
from ..output import say
from ..run import Run, existing_parent, file_hash, fingerprint, stage, write_json, write_text
from ..settings import Settings
from ..values import is_address, is_hub_id
from .clean import Findings, draw_parts, refuse_single, report_readings, streams
from .encode import BATCH, IGNORED, encode_rows
from .load import files_of
from .pairs import encode_pairs
from .prepared import Prepared, first_whole
from .preview import histogram
from .turns import TURN_KEY, Row

BESIDE = ".data-"  # how the folder is called that rows are made ready in
GROWS = 6  # times the size of the data that is written on the way, at most
MADE = ("data/train.parquet", "data/eval.parquet", TEMPLATE)


def local_inputs(run: Run) -> list[object]:
    """What identifies a local dataset (its content), a local model (its files) and the chat template of an adapter, so that changed ones are prepared again."""
    model = Path(run.settings.model).expanduser()
    datasets = [Path(part["path"]).expanduser() for part in run.settings.parts if part["path"] != "demo"]
    files = [path for data in datasets for path in (sorted(data.rglob("*")) if data.is_dir() else [data])]
    return [
        [file_hash(path) for path in files if path.is_file()],
        sorted((path.name, path.stat().st_size) for path in model.iterdir())
        if model.is_dir() and run.settings.model != "demo"
        else None,
        chosen_template(run.settings),
    ]


class Ready(NamedTuple):
    """Rows made ready in a folder beside data/, with their facts and what is to be said of them."""

    folder: Path
    facts: dict[str, Any]
    found: Findings


def make_ready(run: Run) -> Ready:
    """Read, clean, tokenise and draw the rows into a folder of their own; a failure leaves the run as it was. Raises DataError, ModelError, StorageError."""
    settings, found = run.settings, Findings()
    for left in run.folder.glob(f"{BESIDE}*"):
        shutil.rmtree(left)
    refuse_full_disk(settings)
    folder = Path(tempfile.mkdtemp(prefix=BESIDE, dir=run.folder))
    try:
        return Ready(folder, prepared(folder, settings, found), found)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def prepared(folder: Path, settings: Settings, found: Findings) -> dict[str, Any]:
    """Write the files of data/ into a folder; the facts."""
    encoder, (rows, others) = Encoder(settings, found), streams(settings, found)
    train, given = Prepared(encoder(rows), folder / "rows.tmp"), None
    if others is not None:
        given = Prepared(encoder(others), folder / "others.tmp")
    refuse_single(found, settings)
    parts = draw_parts(train.keys, given and given.keys, settings, found)
    refuse_too_few(*map(len, parts), settings, found)
    train.take(parts[0], folder / "train.parquet")
    (given or train).take(parts[1], folder / "eval.parquet")
    refuse_endless(encoder.tokenizer, first_whole(folder / "train.parquet", settings.max_length), settings)
    write_text(folder / Path(TEMPLATE).name, encoder.tokenizer.chat_template)
    write_json(folder / "examples.json", found.examples)
    for rest in folder.glob("*.tmp"):
        rest.unlink()
    print_of = fingerprint([file_hash(path) for path in sorted(folder.glob("*.parquet"))])
    template = encoder.tokenizer.chat_template
    return describe(train, *parts, found, settings) | {"date": held_date(template), "fingerprint": print_of}


@stage(
    "data",
    reads=(
        "model", "revision", "adapter", "chat_template", "thinking", "max_length", "dataset", "dataset_config", "split", "columns", "bad_rows",
        "pairs", "duplicates", "long_rows", "eval_split", "eval_fraction", "eval_rows", "seed",
    ),
    inputs=local_inputs,
    result=lambda run: [file_hash(run.folder / name) for name in MADE if (run.folder / name).is_file()],
    facts=("data",),
    outputs=MADE,
    prepares=make_ready,
    sets_aside=True,
)  # fmt: skip
def prepare_data(run: Run, ready: Ready) -> None:
    """Put the rows that are ready into data/, in place of what was there: train.parquet, eval.parquet (see prepared.py), the chat template of the run."""
    folder = run.fresh("data")
    for path in ready.folder.iterdir():
        path.rename(folder / path.name)
    ready.folder.rmdir()
    run.record("data", **ready.facts)
    report(ready.facts, run.settings, ready.found)
    report_refusals(ready.found)


class Encoder:
    """Makes rows ready for the trainer; the tokenizer is loaded with the first of them, as its template may depend on whether they have tools."""

    def __init__(self, settings: Settings, found: Findings):
        self.settings, self.found, self.tokenizer = settings, found, None

    def __call__(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Rows as `encode_rows` or `encode_pairs` gives them. Raises ModelError."""
        first = list(itertools.islice(rows, BATCH))
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.settings, tools=any("tools" in row for row in first))
        encode = encode_pairs if self.settings.road == "dpo" else encode_rows
        every = itertools.chain(first, rows)
        return encode(self.tokenizer, every, self.settings, self.found, embedding_rows(self.settings))


def refuse_full_disk(settings: Settings) -> None:
    """Raises StorageError where local data, made ready, would not fit into the run folder's disk."""
    paths = [part["path"] for part in settings.parts]
    local = [path for path in paths if path != "demo" and not is_hub_id(path) and not is_address(path)]
    needed = sum(source.size for path in local for source in files_of(path)) * GROWS
    free = shutil.disk_usage(existing_parent(settings.folder)).free
    if needed > free:
        raise StorageError(
            f"Preparing {settings.dataset_name} needs about {needed / GB:.1f} GB of disk, and {free / GB:.1f} GB are free at {settings.storage}.",
            "Free some space, set `storage` to another disk, or take a part of the rows with `split`, such as `train[:100000]`.",
        )


def refuse_too_few(train: int, held_out: int, settings: Settings, found: Findings) -> None:
    """Raises DataError when no row is left to learn from or to measure with."""
    if train and held_out:
        return
    reasons = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in found.dropped.items() if count)
    if refusals := "; ".join(refusals_of(found)):
        reasons += f"; {refusals}"
    template = sum(count for reason, count in found.dropped.items() if reason.endswith("_template"))
    raise DataError(
        f"Too few rows of {settings.dataset_name} are left: {train} to learn from, {held_out} to measure with ({reasons or 'none dropped'}; max_length {settings.max_length}).",
        "Choose another `chat_template`, or take the system and tool turns out of the rows."
        if template > len(found.lengths) / 2
        else "Raise `max_length` or shorten the questions where answers lie beyond it; give more rows that differ.",
    )


def refusals_of(found: Findings) -> list[str]:
    """What the chat template said against rows, in its own words, with how many and which."""
    return [f"{count} refused: {reason} ({first})" for reason, count, first in found.refused.listed()]


def report_refusals(found: Findings) -> None:
    """Say what the chat template said against rows that were left out."""
    for line in refusals_of(found):
        say(f"data: by the chat template, {line}")


def refuse_endless(tokenizer: Any, whole: Row | None, settings: Settings) -> None:
    """Raises ModelError when the chat template ends answers with a token that nothing takes for an end: the model would never stop. whole: a row that was not cut."""
    ends = end_ids(tokenizer, settings)
    stretches = [
        list(labels)
        for learnt, labels in itertools.groupby(whole["labels"] if whole else [], lambda label: label != IGNORED)
        if learnt
    ]
    looked_at = stretches if own_template(settings.chat_template) else stretches[-1:]
    last = next((int(labels[-1]) for labels in looked_at if labels[-1] not in ends), None)
    if last is not None:
        raise ModelError(
            f"The chat template ends answers with {tokenizer.decode([last])!r}, which is no end token of {settings.model}.",
            "Set `chat_template: alpaca`, whose answers end with the model's own end token, or choose a model whose template and end token agree.",
        )


def describe(
    rows: Prepared, train: list[int], held_out: list[int], found: Findings, settings: Settings
) -> dict[str, Any]:
    """The facts of the rows: how many and why others are not there, tokens per epoch, and true lengths in tokens. train, held_out: which rows."""
    lengths = sorted(found.lengths)
    return {
        "read": found.read,
        "kept": len(train) + len(held_out),
        "dropped": {reason: count for reason, count in found.dropped.items() if count},
        "changed": {reason: count for reason, count in found.changed.items() if count},
        "noted": {reason: count for reason, count in found.noted.items() if count},
        "unused": [name.removeprefix(TURN_KEY) for name in found.unused],
        "truncated": found.truncated,
        "cut_tokens": found.cut_tokens,
        "answers_not_learnt": found.answers_not_learnt,
        "train_rows": len(train),
        "eval_rows": len(held_out),
        "train_tokens": sum(rows.tokens[i] for i in train),
        "learnt_tokens": sum(rows.learnt[i] for i in train),
        "length": {
            "median": int(statistics.median(lengths)),
            "p95": lengths[math.ceil(0.95 * len(lengths)) - 1],
            "longest": lengths[-1],
            "histogram": histogram(lengths, settings.max_length),
        },
        "form": found.readings[0][1].form,
        "schema": found.readings[0][1].name,
        "columns": found.readings[0][1].columns,
        "revision": next(iter(found.revisions.values())) if len(found.revisions) == 1 else None,
        "revisions": found.revisions,
    }


def report(facts: dict[str, Any], settings: Settings, found: Findings) -> None:
    """Say what was recognised, kept, dropped and cut."""
    say(f"data: {facts['read']} rows read")
    report_readings(found)
    say(f"data: {facts['train_rows']} to train on, {facts['eval_rows']} held out")
    for verb in ("dropped", "changed", "noted"):
        counts = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in facts[verb].items())
        if counts or verb == "dropped":
            say(f"data: {verb} {counts or 'none'}")
    if facts["answers_not_learnt"]:
        say(
            f"data: {facts['answers_not_learnt']} answers of earlier turns are not learnt: the chat template does not show them whole once the chat goes on"
        )
    if facts["truncated"]:
        say(
            f"data: {facts['truncated']} cut at {settings.max_length} tokens; {facts['cut_tokens']} tokens beyond are not learnt"
        )
