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
from ..retries import ANEW, PASSING, REFUSED, cause_of, in_words, persistently, status_of
from ..run import file_hash, write_text
from ..settings import Settings
from .kept import is_ours, keep_theirs
from .secrets import refuse_secrets

AGAIN = "autosloth publish"
CARD = "README.md"
# What would be taken for a part of the model where an earlier training left it. A repository holds one training: who wants the one before finds it in its history.
OF_A_MODEL = ["*.safetensors", "*.safetensors.index.json", "*.gguf", "Modelfile", "config.json", "adapter_config.json"]
NO_TOKEN = "Make one with write access at huggingface.co/settings/tokens and give it as HF_TOKEN (environment or Colab secret)."


def upload(folder: Path, repo: str, settings: Settings) -> str:
    """Create the repository if needed and upload everything, README.md last; returns its address. Raises HubError for a file with a secret in it."""
    refuse_secrets(folder)
    return persistently(partial(send, folder, repo, settings), also=ANEW)


def send(folder: Path, repo: str, settings: Settings) -> str:
    """The same once: what a person wrote into the card there stays, what an earlier training of ours left goes.

    What the repository holds already is not sent, and where it holds all of a commit none is made: so it may be repeated, also after a commit whose
    answer was lost.
    """
    api = hub_api()
    url = str(api.create_repo(repo, private=settings.private, exist_ok=True))
    if settings.private and not api.model_info(repo).private:
        raise HubError(
            f"{repo} exists already and is public, but `private` is set.",
            "Make it private in its settings on the Hub, or set `repo` to another name.",
        )
    card, theirs = folder / CARD, card_there(repo)
    stale = OF_A_MODEL if theirs and is_ours(theirs) else None
    commit_folder(repo, folder, "Model, tokenizer and GGUF", leave_out=CARD, deleted=stale)
    if theirs:
        write_text(card, keep_theirs(card.read_text(encoding="utf-8"), theirs))
    api.upload_file(repo_id=repo, path_or_fileobj=card, path_in_repo=CARD, commit_message="Model card")
    return url


def card_there(repo: str) -> str | None:
    """The card that a repository has by now; None where it has none. One of an earlier day, which the cache may hold, will not do."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        path = hub_api().hf_hub_download(repo, CARD, force_download=True)
    except EntryNotFoundError:
        return None
    return Path(path).read_text(encoding="utf-8", errors="replace")


def compare_with_hub(api: Any, folder: Path, repo: str, again: str = AGAIN) -> str:
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
def hub_errors(what: str, again: str = AGAIN) -> Iterator[None]:
    """Turn the client's errors into a HubError that says what to do, `again` say; no message holds the token."""
    import httpx
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        yield
    except (httpx.HTTPError, OfflineModeIsEnabled, RuntimeError, ValueError) as error:
        # A RuntimeError only names the file that broke (huggingface_hub 1.33, _upload_lfs_files); its cause says why.
        raise HubError(*explain(error, what, again)) from None


def explain(error: Exception, what: str, again: str) -> tuple[str, str]:
    """What is wrong and what to do, from an error of the client."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    go_on = f"run `{again}` again; what arrived is not sent twice."
    cause = cause_of(error)
    status, said = status_of(cause), getattr(cause, "server_message", None)
    if status and status not in PASSING:
        todo = NO_TOKEN[:-1] + f"; then {go_on}" if status in (401, 403) else go_on.capitalize()
        return f"The Hub refused {what}: {REFUSED.get(status, f'status {status}')}{f' ({said})' if said else ''}.", todo
    if isinstance(cause, OfflineModeIsEnabled):
        return f"The Hub cannot be reached for {what}: HF_HUB_OFFLINE is set.", f"Take it away and {go_on}"
    if cause:
        return f"The Hub cannot be reached for {what}: {in_words(cause)}.", f"Check the network and {go_on}"
    return f"The Hub's client refused {what} ({first_lines(error)}).", f"Correct that and {go_on}"
