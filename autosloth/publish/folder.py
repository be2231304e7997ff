"""The publish folder: exactly what goes to the Hub, its card written last."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from ..output import say
from ..proof import refuse_unproven
from ..run import Run, clear_before, refuse_altered, stage, write_text
from ..values import is_hub_id
from .card import render_card
from .curve import CURVE, draw_curve
from .settings_file import SETTINGS, settings_file


@stage(
    "card",
    reads=("repo", "publish_to_hub", "private"),
    after=("train", "merge", "gguf", "verify"),
    facts=("card",),
    outputs=("publish",),
    replaces=True,
)
def write_card(run: Run) -> None:
    """Fill publish/ with exactly what goes to the Hub: the merged model or the adapter, the GGUF, and README.md last."""
    for earlier in ("train", "merge", "gguf"):
        refuse_altered(run, earlier, ("adapter", "merged", "gguf"))
    refuse_unproven(run, run.path("gguf"))
    model = run.path("merged") if run.settings.merged else run.path("adapter")
    plots = run.path("rounds").glob("*.png")  # of self-play
    with run.replaced("publish") as folder:
        for path in [*model.iterdir(), *run.path("gguf").iterdir(), *plots]:
            if path.is_file() and path.name != "README.md":
                link(path, folder / path.name)
        if not run.settings.merged:
            hide_local_base(folder / "adapter_config.json")
        draw_curve(run, folder / CURVE)
        write_text(folder / SETTINGS, settings_file(run.settings))
        write_text(folder / "README.md", render_card(run))
        files = sorted(path.name for path in folder.iterdir())
    run.record("card", path="publish/README.md", files=files)
    say(f"card: {run.path('publish', 'README.md')}")
    clear_before(run)


def link(source: Path, target: Path) -> None:
    """A second name for the file where the disk can, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def hide_local_base(path: Path) -> None:
    """PEFT writes where the base lies on this disk; a published adapter names only the folder."""
    config = json.loads(path.read_text(encoding="utf-8"))
    base = config["base_model_name_or_path"]
    if not is_hub_id(base):
        config["base_model_name_or_path"] = Path(base).name
        path.unlink()  # it may be a second name of the file in adapter/
        write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
