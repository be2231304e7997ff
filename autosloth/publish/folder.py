"""The publish folders: exactly what goes to the Hub, one folder for each repository, its card written last."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from ..models import on_hub
from ..output import say
from ..proof import refuse_unproven
from ..run import Run, clear_before, refuse_altered, stage, write_text
from ..values import is_hub_id
from .card import render_card
from .curve import CURVE, draw_curve
from .repositories import GGUF, MODEL, Kind, repositories
from .settings_file import SETTINGS, base_commit, dataset_commits, settings_file

TEMPLATE = "chat_template.jinja"


@stage(
    "card",
    reads=("repo", "publish_to_hub", "private", "one_repo", "card_rows"),
    after=("train", "merge", "gguf", "verify"),
    facts=("card",),
    outputs=(MODEL.folder, GGUF.folder),
    replaces=True,
)
def write_card(run: Run) -> None:
    """Fill publish/ with exactly what goes to the Hub: the merged model or the adapter, and its card last; the same for the GGUF files in publish-GGUF/."""
    for earlier in ("train", "merge", "gguf"):
        refuse_altered(run, earlier, ("adapter", "merged", "gguf"))
    refuse_unproven(run, run.path("gguf"))
    wanted = repositories(run.settings)
    for repository in wanted:
        with run.replaced(repository.folder) as folder:
            fill(run, folder, repository.kind)
    if GGUF not in wanted:
        run.fresh(GGUF.folder).rmdir()
    cards = [f"{repository.folder}/README.md" for repository in wanted]
    files = {each.folder: sorted(path.name for path in run.path(each.folder).iterdir()) for each in wanted}
    run.record("card", path=cards[0], files=files)
    for card in cards:
        say(f"card: {run.path(card)}")
    clear_before(run)


def fill(run: Run, folder: Path, kind: Kind, early: bool = False) -> None:
    """Put into an empty folder what goes into a repository of this kind, the card last; early: what there is right after the training."""
    merged = run.settings.merged
    if kind != "gguf":
        if merged and not early:
            link_files(run.path("merged"), folder)
        link_adapter(run, folder / "adapter" if merged else folder)
        link_files(run.path("rounds"), folder, "*.png")  # of self-play
        draw_curve(run, folder / CURVE)
        pins = base_commit(run), dataset_commits(run)
        write_text(folder / SETTINGS, settings_file(run.settings, names_on_hub(run), *pins))
    if kind != "model":
        link_files(run.path("gguf"), folder)
        if "adapter" in run.settings.quantizations and not (folder / TEMPLATE).exists():
            link_files(run.path("adapter"), folder, TEMPLATE)  # its file goes on another model's, with this template
    write_text(folder / "README.md", render_card(run, kind))


def names_on_hub(run: Run) -> list[str] | None:
    """Which names of the settings are on the Hub, as the training found; None where it did not look."""
    found = run.facts.get("origin", {}).get("on_hub")
    start = run.settings.adapter
    return found if found is None or not start or not is_hub_id(start) else [*found, start]


def link_adapter(run: Run, folder: Path) -> None:
    """Put the adapter and its tokenizer into a folder."""
    link_files(run.path("adapter"), folder)
    hide_local_base(run, folder / "adapter_config.json")


def link_files(source: Path, target: Path, pattern: str = "*") -> None:
    """A second name in `target` for each file of `source` where the disk can, else a copy; a card is left out."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.glob(pattern):
        if path.is_file() and path.name != "README.md":
            link(path, target / path.name)


def link(source: Path, target: Path) -> None:
    """A second name for the file where the disk can, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def hide_local_base(run: Run, path: Path) -> None:
    """PEFT writes where the base lies on this disk; a published adapter names only the folder."""
    config = json.loads(path.read_text(encoding="utf-8"))
    base = config["base_model_name_or_path"]
    if not is_hub_id(base) or (base == run.settings.model and not on_hub(run.facts.get("origin", {}), base)):
        config["base_model_name_or_path"] = Path(base).name
        path.unlink()  # it may be a second name of the file in adapter/
        write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
