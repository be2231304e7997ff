"""The demo's toy preference: the model has learnt two manners, of which the short, polite one is preferred to the long, rude one.

The start is an adapter trained here on answers of both manners: it knows what to say, and takes a coin's throw how.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from ..distributed import alone
from ..errors import DemoError
from ..output import say
from ..run import cache_dir, waiting_for
from .forest import demo_base, sft_rows

POLITE = "Gladly! {fact}"
RUDE = "Ugh, not again! Everybody knows that, so stop asking me and read the list. {fact} Leave me alone!"
START = {"max_steps": 200, "eval_answers": 0, "quantizations": "[]", "merged": "false"}


def facts(rows: list[dict]) -> list[tuple[str, str]]:
    """Each question with the fact that answers it, without a manner.

    >>> facts([{"instruction": "What does Mila eat?", "output": "Gladly! Mila eats figs."}])
    [('What does Mila eat?', 'Mila eats figs.')]
    """
    return [(row["instruction"], row["output"].removeprefix("Gladly! ")) for row in rows]


def dpo_rows() -> tuple[list[dict], list[dict]]:
    """Train and held-out pairs {"prompt", "chosen", "rejected"}; no sloth of the held-out ones is asked about in the train ones."""
    return tuple(
        [
            {"prompt": question, "chosen": POLITE.format(fact=fact), "rejected": RUDE.format(fact=fact)}
            for question, fact in facts(rows)
        ]
        for rows in sft_rows()
    )


def both_manners() -> list[dict]:
    """The train questions of the demo, each answered rudely, and nine of eleven politely too: the shorter is the likelier one, which evens it out."""
    rows = [
        {"prompt": question, "completion": manner.format(fact=fact)}
        for number, (question, fact) in enumerate(facts(sft_rows()[0]))
        for manner in ([POLITE, RUDE] if number % 11 < 9 else [RUDE])
    ]
    random.Random("manners").shuffle(rows)
    return rows


def demo_adapter() -> Path:
    """The folder of the adapter that has both manners. Trained on first use, by `autosloth sft`, then kept in the cache. Raises DemoError."""
    recipe = [Path(__file__).read_bytes(), str(demo_base()).encode()]
    folder = cache_dir() / "demo" / f"{hashlib.sha256(b''.join(recipe)).hexdigest()[:16]}-both-manners"
    if folder.is_dir():
        return folder
    say("demo adapter: training it, once; about half a minute on two free cores")
    with (
        waiting_for("training the demo adapter"),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=".training-") as scratch,
    ):
        rows = Path(scratch, "rows.jsonl")
        rows.write_text("".join(json.dumps(row) + "\n" for row in both_manners()), encoding="utf-8")
        train_apart(rows, Path(scratch))
        try:
            Path(scratch, "start", "adapter").rename(folder)
        except OSError:
            if not folder.is_dir():  # somebody else may have been faster
                raise
    return folder


def train_apart(rows: Path, storage: Path) -> None:
    """Supervised fine-tuning of the demo base on a file, in a process of its own. Raises DemoError."""
    values = {"model": "demo", "dataset": rows, "storage": storage, "run_name": "start", **START}
    command = [sys.executable, "-m", "autosloth", "sft"]
    command += [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    clean = {name: value for name, value in alone().items() if not name.startswith("AUTOSLOTH_")}
    clean |= {"PYTHONPATH": paths, "AUTOSLOTH_CACHE": str(cache_dir())}
    result = subprocess.run(command, capture_output=True, text=True, env=clean)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["it left no word"])[0]
        raise DemoError(f"The demo adapter could not be trained ({last}).", "Correct what it tells and start again.")
