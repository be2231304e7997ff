"""The run's copy on the Hub: what a training needs to go on from elsewhere, kept in a private repository as long as it lasts."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from .distributed import first
from .errors import HubError
from .hub_client import commit_folder, first_lines, hub_api
from .output import counted, say
from .retries import ANEW, REFUSED, cause_of, in_words, persistently, status_of
from .settings import Settings

SUFFIX = "-checkpoints"
# What can be made again from the adapter, and what only concerns this disk.
LEFT_OUT = ("merged", "gguf", "publish", "publish-GGUF", "verify", "before", ".lock")
PAUSE = 60  # seconds between two copies that nobody waits for: the Hub takes only so many commits an hour
HALF_COPIED = ".hub.partial"  # removed by the next start
ABOUT = """---
tags: [autosloth]
---
AutoSloth keeps `{name}` here while it trains. With the same settings, on any machine, the run goes on from here; once it is published this repository is deleted.
"""

_worker = ThreadPoolExecutor(1, thread_name_prefix="hub-copy")  # Python waits for it before it ends
_under_way: dict[str, Future] = {}  # run -> the upload that was begun last
_begun: dict[str, float] = {}  # run -> when a copy was begun last that nobody waited for


def copy_name(settings: Settings) -> str:
    """The repository of a run's copy, `owner/<run_name>-checkpoints`; the owner is that of `repo`, or the token's account."""
    owner = settings.repo.partition("/")[0] if "/" in settings.repo else hub_api().whoami(cache=True)["name"]
    return f"{owner}/{settings.run_name}{SUFFIX}"


def keep(settings: Settings, wait: bool = False) -> None:
    """Send what the run folder holds now to its copy, in the background.

    wait: for what is being sent still; without it this time is left out then, and soon after another. An upload that fails ends no
    training: it is said, and the next one brings what this one did not.
    """
    if not (settings.hub_checkpoints and first()):
        return
    name, now = settings.run_name, time.monotonic()
    if wait:
        finish(settings)
    elif (name in _under_way and not _under_way[name].done()) or now - _begun.get(name, -PAUSE) < PAUSE:
        return
    else:
        _begun[name] = now
    _under_way[name] = _worker.submit(send, take(settings.folder), settings)


def finish(settings: Settings) -> None:
    """Wait until what was begun is sent."""
    if upload := _under_way.pop(settings.run_name, None):
        upload.result()


def take(folder: Path) -> Path:
    """A second name for each file that is to be kept, so that they can be sent while the training writes on."""
    snapshot = folder / HALF_COPIED
    shutil.rmtree(snapshot, ignore_errors=True)
    for path in kept(folder):
        target = snapshot / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, target)
        except OSError:  # Drive knows no second names
            shutil.copyfile(path, target)
    (snapshot / "README.md").write_text(ABOUT.format(name=folder.name), encoding="utf-8")
    return snapshot


def kept(folder: Path) -> Iterator[Path]:
    """The files of a run that are worth keeping, none of them half written."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and parts[0] not in LEFT_OUT and not any(part.endswith(".partial") for part in parts):
            yield path


def send(snapshot: Path, settings: Settings) -> None:
    """Make the copy hold exactly this; says where that failed."""
    try:
        with copy_errors("written"):
            persistently(partial(commit, snapshot, settings), also=ANEW)
        with contextlib.suppress(HubError), copy_errors("squashed"):
            hub_api().super_squash_history(copy_name(settings))  # old checkpoints would fill the account; or next time
    except HubError as error:
        say(f"hub copy: not kept this time, the training goes on. {error}")
    finally:
        shutil.rmtree(snapshot, ignore_errors=True)


def commit(snapshot: Path, settings: Settings) -> None:
    """Make the copy hold exactly this, in one commit, or none where it does already."""
    api, name = hub_api(), copy_name(settings)
    warnings.filterwarnings("ignore", "It seems that you are about to commit a data file", UserWarning)
    api.create_repo(name, private=True, exist_ok=True)
    if not api.model_info(name).private:
        raise HubError(f"{name} is public.", "Delete it or make it private: the data of the run would be open.")
    files = sum(path.is_file() for path in snapshot.rglob("*"))
    commit_folder(name, snapshot, f"{counted(files, 'file')} of a run", replaced=api.list_repo_files(name))


def bring_back(settings: Settings) -> None:
    """Fill an empty run folder from its copy on the Hub, where there is one. Raises HubError where that cannot be known: to begin anew would be to lose it."""
    folder = settings.folder
    if not (settings.hub_checkpoints and first()) or (folder / "settings.json").exists():
        return
    from huggingface_hub.errors import RepositoryNotFoundError

    fetched = folder / HALF_COPIED
    shutil.rmtree(fetched, ignore_errors=True)
    with copy_errors("read"):
        name = copy_name(settings)
        try:
            persistently(partial(hub_api().snapshot_download, name, local_dir=fetched))
        except RepositoryNotFoundError:
            return
    shutil.rmtree(fetched / ".cache", ignore_errors=True)
    for path in sorted(
        fetched.iterdir(), key=lambda path: path.name == "settings.json"
    ):  # which tells that all is there
        if path.name not in ("README.md", ".gitattributes"):
            shutil.rmtree(folder / path.name) if (folder / path.name).is_dir() else None
            path.rename(folder / path.name)
    shutil.rmtree(fetched)
    say(f"hub copy: {folder} goes on from {name}")


def drop(settings: Settings) -> None:
    """Delete the copy of a run that is published, unless it is to be kept; says what became of it."""
    if not settings.hub_checkpoints:
        return
    finish(settings)
    try:
        with copy_errors("deleted"):
            name = copy_name(settings)
            if settings.keep_hub_checkpoints or not settings.publish_to_hub:
                reason = "`keep_hub_checkpoints`" if settings.keep_hub_checkpoints else "until the run is published"
                return say(f"hub copy: {name} stays ({reason})")
            persistently(partial(hub_api().delete_repo, name, missing_ok=True))
        say(f"hub copy: {name} is deleted; the run is published")
    except HubError as error:
        say(f"hub copy: {error.what} It can be deleted in its settings on the Hub.")


@contextlib.contextmanager
def copy_errors(what: str) -> Iterator[Any]:
    """Turn the client's errors into a HubError that says what to do; no message holds the token."""
    import httpx
    from huggingface_hub.errors import LocalEntryNotFoundError, LocalTokenNotFoundError, OfflineModeIsEnabled

    clients = (httpx.HTTPError, OfflineModeIsEnabled, LocalTokenNotFoundError, LocalEntryNotFoundError, RuntimeError)
    try:
        yield
    except clients as error:
        cause = cause_of(error)
        reason = REFUSED.get(status_of(cause)) or (in_words(cause) if cause else first_lines(error))
        raise HubError(
            f"The copy of the run on the Hub could not be {what} ({reason}).",
            "Check the network and HF_TOKEN and run the same again; without `hub_checkpoints` the run is on this disk alone.",
        ) from None
