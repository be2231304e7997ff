"""One folder to one repository of the Hugging Face Hub, the card last, and reading back what the Hub then holds."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import HubError
from ..hub_client import commit_folder, first_lines, hub_api
from ..output import say
from ..retries import ANEW, PASSING, REFUSED, cause_of, in_words, persistently, status_of
from ..run import file_hash, write_text
from ..settings import Settings
from .kept import is_ours, keep_theirs
from .secrets import refuse_secrets

CARD = "README.md"
BY_US = "AutoSloth: "  # begins the title of each commit
WEIGHTS = ["*.safetensors", "*.bin", "*.gguf", "*.pt", "*.onnx"]
NO_TOKEN = "Make one with write access at huggingface.co/settings/tokens and give it as HF_TOKEN (environment or Colab secret)."


def upload(folder: Path, repo: str, settings: Settings, run: Path) -> str:
    """Create the repository if needed and upload everything, README.md last; run: the run folder that it is of; returns its address. Raises HubError for a file with a secret in it."""
    refuse_secrets(folder, run)
    return persistently(partial(send, folder, repo, settings), also=ANEW)


def send(folder: Path, repo: str, settings: Settings) -> str:
    """The same once: what a person wrote into the card there stays, what an earlier training of ours left goes.

    What the repository holds already is not sent, and where it holds all of a commit none is made: so it may be repeated, also after a commit whose
    answer was lost.
    """
    url = str(hub_api().create_repo(repo, private=settings.private, exist_ok=True))
    refuse_taken(repo, settings)
    card, theirs, ours = folder / CARD, card_there(repo), published_before(repo)
    if not card.is_file():  # what is there stays as it is, for now
        commit_folder(repo, folder, f"{BY_US}{contents(folder)}")
        return url
    if gone := [name for name in ours if not (folder / name).is_file()]:
        say(
            f"publish: {repo} held files of an earlier upload; what is no part of this one stays in its history alone: {', '.join(gone)}"
        )
    commit_folder(repo, folder, f"{BY_US}{contents(folder)}", leave_out=CARD, replaced=ours)
    if theirs:
        write_text(card, keep_theirs(card.read_text(encoding="utf-8"), theirs))
    hub_api().upload_file(repo_id=repo, path_or_fileobj=card, path_in_repo=CARD, commit_message=f"{BY_US}card")
    return url


def refuse_taken(repo: str, settings: Settings) -> None:
    """Raises HubError where a repository of this name is there that the run must not fill: a public one where `private` is set, or somebody else's model."""
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import filter_repo_objects

    try:
        info = hub_api().model_info(repo)
    except RepositoryNotFoundError:
        return
    if settings.private and not info.private:
        raise HubError(
            f"{repo} exists already and is public, but `private` is set.",
            "Make it private in its settings on the Hub, or set `repo` to another name.",
        )
    weights = [*filter_repo_objects((file.rfilename for file in info.siblings), allow_patterns=WEIGHTS)]
    if weights and not published_before(repo) and not is_ours(card_there(repo) or ""):
        raise HubError(
            f"{repo} holds a model already that AutoSloth did not publish ({weights[0]}).",
            "Set `repo` to another name, or delete that repository on the Hub.",
        )


def published_before(repo: str) -> list[str]:
    """The files that earlier uploads of ours brought to a repository, as the commits that they are of tell; without the card.

    A repository holds one training: what the one before left there would be taken for a part of it.
    """
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    try:
        tree = [*hub_api().list_repo_tree(repo, recursive=True, expand=True)]
    except RepositoryNotFoundError:
        return []
    files = [each for each in tree if isinstance(each, RepoFile)]
    ours = [file.path for file in files if file.last_commit and file.last_commit.title.startswith(BY_US)]
    return [path for path in ours if path != CARD]


def contents(folder: Path) -> str:
    """What a folder brings, for the title of its commit.

    >>> contents(Path("/nowhere"))
    'files'
    """
    kinds = {"model": "model*.safetensors", "adapter": "**/adapter_model.safetensors", "GGUF": "*.gguf"}
    return " and ".join(kind for kind, pattern in kinds.items() if any(folder.glob(pattern))) or "files"


def card_there(repo: str) -> str | None:
    """The card that a repository has by now; None where it has none. One of an earlier day, which the cache may hold, will not do."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        path = hub_api().hf_hub_download(repo, CARD, force_download=True)
    except EntryNotFoundError:
        return None
    content = Path(path).read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def compare_with_hub(api: Any, folder: Path, repo: str, again: str = "autosloth publish") -> str:
    """Hash what the Hub holds against publish/; returns the commit. Raises HubError that names the files that differ; again: the command that sends them."""
    info = persistently(partial(api.model_info, repo, files_metadata=True))
    there = {file.rfilename: (file.lfs.sha256 if file.lfs else file.blob_id) for file in info.siblings}
    wrong = []
    for path in files_of(folder):
        name = path.relative_to(folder).as_posix()
        if there.get(name) not in (file_hash(path), git_hash(path)):
            wrong.append(name)
    if wrong:
        raise HubError(
            f"{repo} does not hold what was uploaded: {', '.join(wrong)}.",
            f"Run `{again}` again; only these files are sent.",
        )
    return info.sha


def git_hash(path: Path) -> str:
    """The id that git gives a file: SHA-1 of `blob <size>\\0` and the content (git-scm.com/book, Git Objects)."""
    content = path.read_bytes() if path.stat().st_size < 2e8 else b""  # the Hub keeps larger files by SHA-256
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def files_of(folder: Path) -> list[Path]:
    """The files of a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def hub_errors(what: str, again: str = "") -> Iterator[None]:
    """Turn the client's errors into a HubError that says what to do; no message holds the token. again: the command that sends the rest, where an upload began."""
    import httpx
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        yield
    except (httpx.HTTPError, OfflineModeIsEnabled, RuntimeError, ValueError, LookupError, TypeError) as error:
        # A RuntimeError only names the file that broke (huggingface_hub 1.33, _upload_lfs_files); its cause says why.
        raise HubError(*explain(error, what, again)) from None


def explain(error: Exception, what: str, again: str) -> tuple[str, str]:
    """What is wrong and what to do, from an error of the client."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    go_on = f"run `{again}` again; what arrived is not sent twice." if again else "run the same command again."
    cause = cause_of(error)
    status, said = status_of(cause), getattr(cause, "server_message", None)
    if status and status not in PASSING:
        todo = NO_TOKEN[:-1] + f"; then {go_on}" if status in (401, 403) else go_on.capitalize()
        return f"The Hub refused {what}: {REFUSED.get(status, f'status {status}')}{f' ({said})' if said else ''}.", todo
    if isinstance(cause, OfflineModeIsEnabled):
        return f"The Hub cannot be reached for {what}: HF_HUB_OFFLINE is set.", f"Take it away and {go_on}"
    if cause:
        return f"The Hub cannot be reached for {what}: {in_words(cause)}.", f"Check the network and {go_on}"
    if isinstance(error, (LookupError, TypeError)):  # of JSON that is other than the client takes for granted
        return f"The Hub answered something else than was asked of it for {what}.", f"Wait a while and {go_on}"
    return f"The Hub's client refused {what} ({first_lines(error)}).", f"Correct that and {go_on}"
