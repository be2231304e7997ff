"""One folder to one repository of the Hugging Face Hub, the card last, and reading back what the Hub then holds."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import HubError
from ..hub_client import first_lines, hub_api
from ..run import file_hash
from ..settings import Settings

NO_TOKEN = "Make one with write access at huggingface.co/settings/tokens and give it as HF_TOKEN (environment or Colab secret)."


def upload(folder: Path, repo: str, settings: Settings) -> str:
    """Create the repository if needed and upload everything, README.md last; returns its address."""
    api = hub_api()
    url = str(api.create_repo(repo, private=settings.private, exist_ok=True))
    if settings.private and not api.model_info(repo).private:
        raise HubError(
            f"{repo} exists already and is public, but `private` is set.",
            "Make it private in its settings on the Hub, or set `repo` to another name.",
        )
    api.upload_folder(
        repo_id=repo, folder_path=folder, ignore_patterns=["README.md"], commit_message="Model, tokenizer and GGUF"
    )
    api.upload_file(
        repo_id=repo, path_or_fileobj=folder / "README.md", path_in_repo="README.md", commit_message="Model card"
    )
    return url


def compare_with_hub(api: Any, folder: Path, repo: str) -> str:
    """Hash what the Hub holds against publish/; returns the commit. Raises HubError that names the files that differ."""
    info = api.model_info(repo, files_metadata=True)
    there = {file.rfilename: (file.lfs.sha256 if file.lfs else file.blob_id) for file in info.siblings}
    wrong = []
    for path in files_of(folder):
        name = path.relative_to(folder).as_posix()
        if there.get(name) not in (file_hash(path), git_hash(path)):
            wrong.append(name)
    if wrong:
        raise HubError(
            f"{repo} does not hold what was uploaded: {', '.join(wrong)}.",
            "Run `autosloth publish` again; only these files are sent.",
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
def hub_errors(what: str) -> Iterator[None]:
    """Turn the client's errors into a HubError that says what to do; no message holds the token."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except (HfHubHTTPError, httpx.TransportError, OfflineModeIsEnabled, RuntimeError, ValueError) as error:
        # A RuntimeError only names the file that broke (huggingface_hub 1.33, _upload_lfs_files); its cause says why.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise HubError(*explain(cause, what)) from None


def explain(error: BaseException, what: str) -> tuple[str, str]:
    """What is wrong and what to do, from an error of the client."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    again = "run `autosloth publish` again; what arrived is not sent twice."
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else None
        reason = {401: "the token is not valid", 403: "the token may not write there", 404: "it does not exist"}
        said = f" ({error.server_message})" if error.server_message else ""
        todo = NO_TOKEN if status in (401, 403) else again.capitalize()
        return f"The Hub refused {what}: {reason.get(status, f'status {status}')}{said}.", todo
    if isinstance(error, OfflineModeIsEnabled):
        return f"The Hub cannot be reached for {what}: HF_HUB_OFFLINE is set.", f"Take it away and {again}"
    if isinstance(error, httpx.TransportError):
        return f"The Hub cannot be reached for {what} ({type(error).__name__}).", f"Check the network and {again}"
    return f"The Hub's client refused {what} ({first_lines(error)}).", f"Correct that and {again}"
