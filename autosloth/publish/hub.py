"""The Hugging Face Hub: access rights, the upload with the card last, and reading back what the Hub then holds."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import HubError
from ..hub_client import first_lines, hub_api
from ..output import counted, say, size_in_words
from ..proof import refuse_unproven
from ..run import Run, file_hash, stage
from ..settings import Settings

NO_TOKEN = "Make one with write access at huggingface.co/settings/tokens and give it as HF_TOKEN (environment or Colab secret)."


@stage("publish", reads=("publish_to_hub", "repo", "private", "publish_unverified"), after=("card",))
def publish(run: Run) -> None:
    """Upload publish/ when the settings ask for it, the card last, then read the repository back. Raises HubError."""
    if not run.settings.publish_to_hub:
        run.record("publish", repos=run.facts.get("publish", {}).get("repos", []))  # an upload by hand stays known
        return say(f"publish: nothing is uploaded (`publish_to_hub` is off); {run.path('publish')} is ready to be")
    refuse_unverified(run)
    folder, started = run.path("publish"), time.perf_counter()
    repo = repo_id(run.settings)
    refuse_unproven(run, folder)
    with hub_errors(repo):
        api, url = hub_api(), upload(folder, repo, run.settings)
        commit = compare_with_hub(api, folder, repo)
    size = sum(path.stat().st_size for path in files_of(folder))
    run.record(
        "publish",
        repos=[repo],
        url=url,
        commit=commit,
        files=len(files_of(folder)),
        bytes=size,
        seconds=round(time.perf_counter() - started, 2),
    )
    say(f"publish: {url}, {counted(len(files_of(folder)), 'file')}, {size_in_words(size)}, read back and found equal")


def refuse_unverified(run: Run) -> None:
    """Raises HubError when the GGUF was not proven, unless the settings allow that."""
    proof = run.facts.get("verify", {})
    verified = run.mark("verify") is not None
    if not run.settings.quantizations or run.settings.publish_unverified or (verified and proof.get("passed")):
        return
    all_the_same = f"set `publish_unverified: true` and run `autosloth {run.settings.road}` again."
    if verified and proof.get("no_verdict"):
        raise HubError(
            f"There is no verdict on the GGUF, so it is not published: {proof['no_verdict']}.",
            f"Raise `learning_rate` or `max_steps` and train again; or {all_the_same}",
        )
    raise HubError(
        "The GGUF has not passed its verification, so it is not published.",
        f"Run `autosloth verify {run.folder}`; or {all_the_same}",
    )


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


def repo_id(settings: Settings) -> str:
    """`owner/name`; the owner is the token's account unless `repo` names one. Raises HubError without a token, or for a name that the Hub does not take."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = settings.repo or settings.run_name
    repo = name if "/" in name else f"{account()['name']}/{name}"
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise HubError(
            f"{repo} cannot be the name of a repository on the Hub.",
            "Set `repo` to a name without `--` and `..` that ends in a letter or digit and not in `.git`.",
        ) from None
    return repo


def refuse_foreign_token(settings: Settings) -> None:
    """Raises HubError when the token may not write to the repository."""
    me, repo = account(), repo_id(settings)
    owners = {me["name"], *(organisation["name"] for organisation in me.get("orgs", []))}
    if repo.split("/")[0] not in owners:
        raise HubError(
            f"The token of {me['name']} cannot publish to {repo}.",
            f"Set `repo` to a name under {' or '.join(sorted(owners))}.",
        )
    access = me.get("auth", {}).get("accessToken", {})
    allowed = [
        entry["entity"].get("name")
        for entry in access.get("fineGrained", {}).get("scoped", [])
        if "repo.write" in entry["permissions"]
    ]
    if access.get("role") == "fineGrained" and not {repo, repo.split("/")[0]} & set(allowed):
        raise HubError(f"The fine-grained token of {me['name']} has no permission to write to {repo}.", NO_TOKEN)


def account() -> dict[str, Any]:
    """Whose token this is and what it may do. Raises HubError without a token, or with one that cannot write."""
    from huggingface_hub import get_token

    if not get_token():
        raise HubError("There is no Hugging Face token to publish with.", NO_TOKEN)
    with hub_errors("the account"):
        me = hub_api().whoami()
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(f"The Hugging Face token of {me['name']} may only read.", NO_TOKEN)
    return me


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
