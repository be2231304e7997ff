"""The run's copy on the Hub: what a training needs to go on from elsewhere, kept in a private repository as long as it lasts."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from .distributed import first
from .errors import HubError
from .hub_client import commit_folder, first_lines, hub_api
from .output import counted, say
from .retries import ANEW, REFUSED, cause_of, in_words, persistently, status_of
from .settings import Settings

SUFFIX = "-checkpoints"
LONGEST = 96  # characters that the Hub takes as a repository's name
PAUSE = 60  # seconds between two copies that nobody waits for: the Hub takes only so many commits an hour
HALF_COPIED = ".hub.partial"  # removed by the next start
FETCHED = ".hub.fetched"  # a whole copy that is being put into the run folder; the next start does the rest
NOTE = ".hub_copy.json"  # in a run folder: the states of the copy that it wrote or brought back last
# What can be made again from the adapter, and what only concerns this disk.
LEFT_OUT = ("merged", "gguf", "publish", "publish-GGUF", "verify", "before", ".lock", FETCHED, NOTE)
GROWING = ("tensorboard",)  # files that are written on: sent as they were when they were taken
NO_RUN = ("README.md", ".gitattributes", ".cache", *LEFT_OUT)  # what goes neither into a copy nor out of one
OF_A_TRAINING = ("checkpoints", "adapter", "rounds", "merged", "gguf", "publish", "publish-GGUF")
REPLACED = ("settings.json", "facts.json")  # of a run folder without a training: those of the copy tell more
ABOUT = """---
tags: [autosloth]
---
AutoSloth keeps `{name}` here while it trains. With the same settings and the same files of yours, on any machine, the run goes on from here; once it is published this repository is deleted, unless `keep_hub_checkpoints` is set.

<!-- state {state} -->
"""
OURS = ABOUT.partition("{name}")[0]  # how the README of each copy begins
STATE = re.compile(r"^<!-- state (\w+) -->$", re.MULTILINE)

# Python waits for it before it ends: for one copy of a run at most, whose tries and waits are counted.
_worker = ThreadPoolExecutor(1, thread_name_prefix="hub-copy")
_under_way: dict[str, Future] = {}  # run -> the upload that was begun last
_begun: dict[str, float] = {}  # run -> when a copy was begun last that nobody waited for


class Copy(NamedTuple):
    """What the Hub holds under the name of a copy: the commit, its files, and the state that its README tells, which no other copy has."""

    name: str
    head: str
    private: bool
    files: list[str]
    state: str


def copy_name(settings: Settings, account: str = "") -> str:
    """The repository of a run's copy, `owner/<run_name>-checkpoints`; the owner is that of `repo`, or the token's account. Raises HubError for a name that the Hub does not take."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    owner = settings.repo.partition("/")[0] if "/" in settings.repo else account
    name = settings.run_name + SUFFIX
    if len(name) > LONGEST:
        raise HubError(
            f"{name} is too long for the copy of the run on the Hub: {len(name)} characters, of {LONGEST} at most.",
            f"Set `run_name` to a name of at most {LONGEST - len(SUFFIX)} characters.",
        )
    repo = f"{owner or account_of(get_token())}/{name}"
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise HubError(
            f"{repo} cannot be the name of the copy of the run on the Hub.",
            "Set `run_name` to a name without `--` and `..`.",
        ) from None
    return repo


@functools.cache
def account_of(token: str | None) -> str:
    """Whose token this is; asked once."""
    return persistently(partial(hub_api().whoami, token))["name"]


def look(name: str) -> Copy | None:
    """What the Hub holds under the name of a copy; None where nothing is. Raises HubError where it is no copy of ours."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = hub_api().model_info(name)
    except RepositoryNotFoundError:
        return None
    files = [file.rfilename for file in info.siblings or [] if file.rfilename != ".gitattributes"]
    about = readme(name, info.sha) if "README.md" in files else ""
    if files and not about.startswith(OURS):
        raise HubError(
            f"{name} is no copy of a run of AutoSloth's.",
            "Set `run_name` to another name, or delete that repository on the Hub.",
        )
    return Copy(name, info.sha, bool(info.private), files, state_of(about))


def readme(name: str, commit: str) -> str:
    """The README of a repository as of a commit."""
    with TemporaryDirectory() as folder:
        path = hub_api().hf_hub_download(name, "README.md", revision=commit, local_dir=folder)
        return Path(path).read_text(encoding="utf-8", errors="replace")


def state_of(about: str) -> str:
    """The state that the README of a copy tells.

    >>> state_of(ABOUT.format(name="short", state="ab12"))
    'ab12'
    """
    told = STATE.search(about)
    return told[1] if told else ""


def refuse_foreign_copy(name: str) -> None:
    """Raises HubError where a repository of this name is there that is no copy of ours."""
    with copy_errors("read"):
        persistently(partial(look, name))


def known(folder: Path) -> list[str]:
    """The states of the copy that a run folder wrote or brought back last; a note that is damaged tells none."""
    try:
        return [*json.loads((folder / NOTE).read_text(encoding="utf-8"))["states"]]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def note(folder: Path, states: list[str]) -> None:
    """Note these states of the copy as the folder's own, whole or not at all."""
    half = folder / f"{NOTE}.partial"
    half.write_text(json.dumps({"states": [state for state in states if state]}) + "\n", encoding="utf-8")
    os.replace(half, folder / NOTE)


def keep(settings: Settings, wait: bool = False) -> None:
    """Send what the run folder holds now to its copy, in the background.

    wait: for what is being sent still; without it this time is left out then, and soon after another. A copy that fails ends no
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
    try:
        _under_way[name] = _worker.submit(send, take(settings.folder), settings)
    except Exception as error:  # a full disk, say
        shutil.rmtree(settings.folder / HALF_COPIED, ignore_errors=True)
        not_kept(error)


def not_kept(error: Exception) -> None:
    """Say that there is no copy this time."""
    told = str(error) if isinstance(error, HubError) else f"({first_lines(error) or type(error).__name__})"
    say(f"hub copy: not kept this time, the training goes on. {told}")


def finish(settings: Settings) -> None:
    """Wait until what was begun is sent."""
    if upload := _under_way.get(settings.run_name):
        upload.result()
        _under_way.pop(settings.run_name, None)


def take(folder: Path) -> Path:
    """A second name for each file that is to be kept, so that they can be sent while the training writes on."""
    snapshot = folder / HALF_COPIED
    shutil.rmtree(snapshot, ignore_errors=True)
    for path in kept(folder):
        target = snapshot / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if path.relative_to(folder).parts[0] in GROWING:
                shutil.copyfile(path, target)
            else:
                os.link(path.resolve(), target)
        except OSError:  # Drive knows no second names, nor does another disk
            shutil.copyfile(path, target)
    snapshot.mkdir(exist_ok=True)
    about = ABOUT.format(name=folder.name, state=secrets.token_hex(16))
    (snapshot / "README.md").write_text(about, encoding="utf-8")
    return snapshot


def kept(folder: Path) -> Iterator[Path]:
    """The files of a run that are worth keeping, none of them half written."""
    for path in sorted(folder.iterdir()):
        if path.name not in NO_RUN:
            yield from whole_files(path, (folder.resolve(),))


def whole_files(path: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """This file, or those in this folder, behind links too; above: the folders on the way to it, to which no link leads back."""
    if path.name.endswith(".partial"):
        return
    if path.is_file():
        yield path
    elif path.is_dir() and path.resolve() not in above:
        for each in sorted(path.iterdir()):
            yield from whole_files(each, (*above, path.resolve()))


def send(snapshot: Path, settings: Settings) -> None:
    """Make the copy hold exactly this; says where that failed, whatever it was: the training goes on."""
    try:
        with copy_errors("written"):
            name = copy_name(settings)
            persistently(partial(commit, snapshot, settings), also=ANEW)
        with contextlib.suppress(HubError), copy_errors("squashed"):
            hub_api().super_squash_history(name)  # old checkpoints would fill the account; or next time
    except Exception as error:
        not_kept(error)
    finally:
        shutil.rmtree(snapshot, ignore_errors=True)


def commit(snapshot: Path, settings: Settings) -> None:
    """Make the copy hold exactly this, in one commit, or none where it does already. Raises HubError where it is not this folder's.

    The state is noted before it is written: then it is known too where the answer is lost, or this process is. The commit must follow the one that
    was looked at: another machine's that came between is seen at the next look, and refused.
    """
    api, name = hub_api(), copy_name(settings)
    warnings.filterwarnings("ignore", "It seems that you are about to commit a data file", UserWarning)
    api.create_repo(name, private=True, exist_ok=True)
    copy = look(name) or Copy(name, "", True, [], "")
    if not copy.private:
        raise HubError(f"{name} is public.", "Delete it or make it private: the data of the run would be open.")
    refuse_others(copy, settings.folder)
    note(settings.folder, [copy.state, state_of((snapshot / "README.md").read_text(encoding="utf-8"))])
    files = sum(path.is_file() for path in snapshot.rglob("*"))
    commit_folder(name, snapshot, f"{counted(files, 'file')} of a run", replaced=copy.files, parent=copy.head or None)


def refuse_others(copy: Copy, folder: Path) -> None:
    """Raises HubError where another folder wrote the copy last."""
    if copy.files and copy.state not in known(folder):
        raise HubError(
            f"Another machine writes to the same copy, {copy.name}.",
            "Stop one of the two and give it another `run_name`, or delete that repository on the Hub.",
        )


def bring_back(settings: Settings) -> None:
    """Fill a run folder without a training from its copy on the Hub, where there is one; the folder is locked.

    Raises HubError where that cannot be known, to begin anew would be to lose it; and where the folder holds something else than the copy.
    """
    folder = settings.folder
    if not (settings.hub_checkpoints and first()):
        return
    finish(settings)  # of an earlier call in this process
    put_in(folder)
    with copy_errors("read"):
        copy = persistently(partial(look, copy_name(settings)))
        if not (copy and is_needed(copy, folder)):
            return
        fetch_copy(copy, folder)
    put_in(folder)
    say(f"hub copy: {folder} goes on from {copy.name}")


def is_needed(copy: Copy, folder: Path) -> bool:
    """Whether a run folder is to be filled from its copy: not where that is empty, or the folder's own. Raises HubError where it cannot be."""
    if not copy.files or (copy.state in known(folder) and in_the_way(copy, folder, REPLACED)):
        return False
    refuse_in_the_way(copy, folder)
    return True


def check_copy(settings: Settings) -> None:
    """Say what the Hub holds of the run, and which of the two goes on; nothing is changed. Raises HubError where `bring_back` would."""
    folder = settings.folder
    if not settings.hub_checkpoints or (folder / FETCHED).is_dir():  # which the run puts in
        return
    with copy_errors("read"):
        copy = persistently(partial(look, copy_name(settings)))
        if copy and copy.files:
            goes_on = f"{folder} is filled from it" if is_needed(copy, folder) else f"it is of {folder}, which goes on"
            say(f"check: {copy.name} on the Hub holds a copy of this run ({counted(len(copy.files), 'file')}): {goes_on}")  # fmt: skip


def refuse_in_the_way(copy: Copy, folder: Path) -> None:
    """Raises HubError where a copy cannot be brought back: it is not whole, or would take the place of what is in the folder."""
    anew = "delete that repository on the Hub, or set `run_name` to another name."
    if held := in_the_way(copy, folder):
        raise HubError(
            f"{folder} holds a run ({', '.join(held)}) and {copy.name} on the Hub another state of it, which is not from this folder.",
            f"To go on from the copy move the folder away; to go on from the folder {anew}",
        )
    if strange := [name for name in copy.files if name.startswith("/") or ".." in PurePosixPath(name).parts]:
        raise HubError(f"{copy.name} holds a file that lies in no run folder: {strange[0]}.", anew.capitalize())
    if "settings.json" not in copy.files:
        raise HubError(f"{copy.name} is no whole copy of a run: it has no settings.json.", anew.capitalize())


def in_the_way(copy: Copy, folder: Path, more: tuple[str, ...] = ()) -> list[str]:
    """What a folder holds of a run, and these names more, by the names of the copy and of a training."""
    names = {PurePosixPath(name).parts[0] for name in copy.files} - {*NO_RUN, *REPLACED, "/", ".."}
    return [name for name in sorted({*names, ".done", *OF_A_TRAINING, *more}) if holds(folder / name)]


def holds(path: Path) -> bool:
    """Whether there is a file here, or a folder with something in it."""
    return any(path.iterdir()) if path.is_dir() else path.exists() or path.is_symlink()


def fetch_copy(copy: Copy, folder: Path) -> None:
    """Fetch a copy beside what is in the folder; what is there under FETCHED is whole."""
    half = folder / HALF_COPIED
    shutil.rmtree(half, ignore_errors=True)
    persistently(partial(hub_api().snapshot_download, copy.name, revision=copy.head, local_dir=half))
    for path in [half / name for name in NO_RUN]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    note(half, [copy.state])
    half.rename(folder / FETCHED)


def put_in(folder: Path) -> None:
    """Move what was fetched into the run folder, or the rest of it after a kill."""
    fetched = folder / FETCHED
    if not fetched.is_dir():
        return
    last = ("settings.json", NOTE)  # which tell that all is there
    for path in sorted(fetched.iterdir(), key=lambda path: path.name in last and 1 + last.index(path.name)):
        merge(path, folder / path.name)
    fetched.rmdir()


def merge(path: Path, target: Path) -> None:
    """Move a file or folder; a folder into the one that is there, which may be a link to another disk."""
    if not (path.is_dir() and target.is_dir()):
        shutil.move(path, target)
        return
    for each in sorted(path.iterdir()):
        merge(each, target / each.name)
    path.rmdir()


def drop(settings: Settings) -> None:
    """Delete the copy of a run that is published, unless it is to be kept or is not ours; says what became of it."""
    if not settings.hub_checkpoints:
        return
    finish(settings)
    by_hand = "It can be deleted in its settings on the Hub."
    try:
        with copy_errors("deleted"):
            name = copy_name(settings)
            if settings.keep_hub_checkpoints or not settings.publish_to_hub:
                reason = "`keep_hub_checkpoints`" if settings.keep_hub_checkpoints else "until the run is published"
                return say(f"hub copy: {name} stays ({reason})")
            copy = persistently(partial(look, name))
            if copy and not (copy.private and copy.files and copy.state in known(settings.folder)):
                return say(f"hub copy: {name} stays (it is public, or was written from another folder). {by_hand}")
            persistently(partial(hub_api().delete_repo, name, missing_ok=True))
        say(f"hub copy: {name} is deleted; the run is published")
    except HubError as error:
        say(f"hub copy: {error.what} {by_hand}")
    except Exception as error:  # the run is published whatever becomes of the copy
        say(f"hub copy: not deleted ({first_lines(error) or type(error).__name__}). {by_hand}")


@contextlib.contextmanager
def copy_errors(what: str) -> Iterator[Any]:
    """Turn the client's errors into a HubError that says what to do; no message holds the token."""
    import httpx
    from huggingface_hub.errors import LocalEntryNotFoundError, LocalTokenNotFoundError, OfflineModeIsEnabled

    clients = (httpx.HTTPError, OfflineModeIsEnabled, LocalTokenNotFoundError, LocalEntryNotFoundError, RuntimeError)
    strange = (json.JSONDecodeError, LookupError, TypeError, AttributeError)  # of an answer that has another form
    try:
        yield
    except (*clients, *strange, ValueError) as error:
        cause = cause_of(error)
        told = "the answer is not one of the Hub's" if isinstance(error, strange) else first_lines(error)
        reason = REFUSED.get(status_of(cause)) or (in_words(cause) if cause else told)
        raise HubError(
            f"The copy of the run on the Hub could not be {what} ({reason}).",
            "Check the network and HF_TOKEN and run the same again; without `hub_checkpoints` the run is on this disk alone.",
        ) from None
