"""Reading from the Hugging Face Hub: one client, and its errors for models and datasets in our own words."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from .errors import DataError, ModelError
from .retries import cause_of, in_words, is_passing, mend_client, persistently, status_of

Kind = Literal["model", "dataset"]
ERRORS = {"model": ModelError, "dataset": DataError}
UNREACHED = "could not be fetched"  # in the message of an error that tells nothing of what is there


def hub_api() -> Any:
    """huggingface_hub's client; it reads HF_ENDPOINT, and the token from HF_TOKEN, a saved login or Colab's secrets."""
    from huggingface_hub import HfApi

    mend_client()
    return HfApi()


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE tells to use only what was fetched before."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def ask_for(kind: Kind, name: str) -> None:
    """Whether a repository is there and may be read with this token. Raises ModelError or DataError."""
    if not is_offline():
        with reading(kind, name):
            persistently(lambda: hub_api().auth_check(name, repo_type=kind))


def commit_folder(
    repo: str, folder: Path, message: str, leave_out: str = "", replaced: Iterable[str] = (), parent: str | None = None
) -> None:
    """Bring a folder's files to a repository in one commit, or none where it holds them all.

    `upload_folder` would make several, which a kill may part (huggingface_hub 1.33 with Xet). replaced: files of the repository that go in the
    same commit where the folder does not have them; parent: the commit that it must follow, the Hub answers with 412 where another came between.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files.pop(leave_out, None)
    gone = [name for name in replaced if name not in files and name not in (".gitattributes", leave_out)]
    operations = [*map(CommitOperationDelete, gone), *(CommitOperationAdd(name, path) for name, path in files.items())]
    logging.getLogger("huggingface_hub.hf_api").addFilter(news)
    hub_api().create_commit(repo, operations, commit_message=message, parent_commit=parent)


def news(record: logging.LogRecord) -> bool:
    """Whether a line of the Hub's client is worth a user's while: not that a commit would be empty."""
    return "to prevent empty commit" not in record.getMessage()


@contextlib.contextmanager
def reading(kind: Kind, name: str) -> Iterator[None]:
    """Turn the client's errors, and the network's wherever a library wrapped them, into a ModelError or DataError that says what to do; no message holds the token."""
    import httpx
    from huggingface_hub import errors

    clients = (httpx.HTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)
    try:
        yield
    except Exception as error:
        cause = cause_of(error)
        refused = isinstance(cause, errors.RepositoryNotFoundError) or status_of(cause) in (401, 403)
        if not (isinstance(error, clients) or isinstance(cause, RuntimeError) or refused or is_passing(cause)):
            raise
        raise ERRORS[kind](*explain(error, kind, name)) from None


@contextlib.contextmanager
def model_errors(source: str) -> Iterator[None]:
    """Turn the Hub's and transformers' errors into a ModelError that says what to do."""
    try:
        with reading("model", source):
            yield
    except ImportError as error:
        raise ModelError(
            f"The model {source} needs a library that is not installed here ({first_lines(error)}).",
            "Install it, restart the session and run again; or choose a model that needs none.",
        ) from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ModelError(
            f"The model {source} could not be loaded ({first_lines(error)}).",
            "Give a text model in the transformers format with safetensors weights.",
        ) from None


def explain(error: Exception, kind: Kind, name: str) -> tuple[str, str]:
    """What is wrong and what to do, from an error of the client."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    what, cause = f"The {kind} {name}", cause_of(error)
    if isinstance(cause, GatedRepoError):
        return (
            f"{what} is gated.",
            "Ask for access on its page on the Hub and give a token of that account as HF_TOKEN.",
        )
    if isinstance(cause, RepositoryNotFoundError):
        todo = "Check its spelling (there is no folder of that name here either), or give a token that may read it as HF_TOKEN."
        return f"{what} does not exist on the Hub, or is private.", todo
    if isinstance(cause, RevisionNotFoundError):
        return f"{what} has no such revision.", "Correct `revision` or leave it empty."
    if status_of(cause) == 401:  # also for what is public
        todo = "Give a valid token as HF_TOKEN, or take it away: what is public needs none."
        return f"{what} was refused: the token is not valid.", todo
    if status_of(cause) == 403:
        return (
            f"{what} was refused: it may not be read with this token, or without one.",
            "Give one that may as HF_TOKEN.",
        )
    network = cause and (is_passing(cause) or not status_of(cause))
    return (
        f"{what} {UNREACHED} ({in_words(cause) if network else first_lines(error)}).",
        "Check the network and run again; or, if it should be a folder on this disk, its path: there is none of that name.",
    )


def first_lines(error: BaseException) -> str:
    """The first two lines of an error in one: the second one often says what there is instead."""
    return " ".join(str(error).strip().splitlines()[:2])
