"""The runs of a folder, as a table or for scripts: what each was, what came of it, and where it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import AutoSlothError, SettingsError
from ..run import STAGES, Run, refuse_lost_facts


def listed(storage: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The runs in a folder, the newest first, and a sentence on each folder there that cannot be told of.

    Each has `run` (its folder), `road`, `model`, `dataset`, `loss_before` and `loss_after` (held-out, nats a token), `proven` (None: not yet, or nothing to prove),
    `published` (repositories) and `state`. Raises SettingsError where the folder is none.
    """
    folders = [storage] if (storage / "settings.json").is_file() else folders_in(storage)
    rows, problems = [], []
    for folder in folders:
        if (folder / "settings.json").exists() and not (folder / "settings.json").is_file():
            problems.append(f"{folder} is no run: its settings.json is no file.")
            continue
        try:
            row = row_of(Run.open(folder))
            rows.append((changed_at(folder), row))
        except AutoSlothError as error:
            problems.append(error.what)
        except (OSError, TypeError) as error:  # a folder that may not be read; facts in another form
            problems.append(f"{folder} cannot be read ({error}).")
    return [row for _, row in sorted(rows, key=lambda each: each[0], reverse=True)], problems


def folders_in(storage: Path) -> list[Path]:
    """The folders in a folder, but for hidden ones; none where it is not there. Raises SettingsError where it is a file or may not be read."""
    try:
        return sorted(path for path in storage.iterdir() if path.is_dir() and not path.name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SettingsError(f"{storage} cannot be read as a folder ({error.strerror}).", "Give the folder that holds the run folders.") from None  # fmt: skip


def changed_at(folder: Path) -> int:
    """When a run was last begun or measured, in nanoseconds."""
    return max(path.stat().st_mtime_ns for path in folder.glob("*.json"))


def row_of(run: Run) -> dict[str, Any]:
    """One run, from its settings, facts and marks. Raises AutoSlothError where they are damaged, TypeError where facts have another form."""
    for name in STAGES:
        refuse_lost_facts(run, name)
    settings, facts = run.settings, run.facts
    losses = {when: (facts.get("eval", {}).get(when) or {}).get("loss") for when in ("before", "after")}
    proof = facts.get("verify", {}).get("passed")
    return {
        **{"run": str(run.folder), "road": settings.road, "model": settings.model, "dataset": settings.dataset_name},
        **{f"loss_{when}": None if loss is None else float(loss) for when, loss in losses.items()},
        "proven": proof if proof is False or run.mark("verify") else None,
        "published": [str(repo) for repo in facts.get("publish", {}).get("repos", [])] if run.mark("publish") else [],
        "state": state(run),
    }


def state(run: Run) -> str:
    """Where a run stands: `finished`, `running: train`, `failed: verify`, or `next: gguf` of one that was stopped."""
    to_do = [name for name in STAGES if run.mark(name) is None]
    if is_locked(run.folder):
        return f"running: {to_do[0]}" if to_do else "running"
    if failed := [name for name in to_do if run.failure(name)]:
        return f"failed: {failed[0]}"
    return f"next: {to_do[0]}" if to_do else "finished"


def is_locked(folder: Path) -> bool:
    """Whether a process works in a run folder now."""
    path = folder / ".lock"
    if not path.is_file():
        return False
    try:
        with FileLock(path).acquire(timeout=0):
            return False
    except Timeout:
        return True


def show_runs(rows: list[dict[str, Any]]) -> None:
    """Print the runs as a table: below each name its model, its dataset and where it is published. On a narrow terminal names go on in the next line, none is cut."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=len(rows) > 1)
    table.add_column("run, model, dataset, published as", overflow="fold")
    for title in ("road", "held-out\nloss", "proven", "state"):
        table.add_column(title, overflow="fold")
    for row in rows:
        about = [row["model"], row["dataset"], *(row["published"] or ["not published"])]
        named = Text.assemble((Path(row["run"]).resolve().name, "bold"), "\n  " + "\n  ".join(about))
        losses = [f"{row[name]:.4f}" for name in ("loss_before", "loss_after") if row[name] is not None]
        proven = {True: "yes", False: "NO", None: "-"}[row["proven"]]
        table.add_row(named, *map(Text, [row["road"], "\n-> ".join(losses) or "-", proven, row["state"].replace(": ", ":\n")]))  # fmt: skip
    Console().print(table)
