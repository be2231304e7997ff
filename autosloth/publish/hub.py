"""The stages that upload: the adapter right after the training, everything after the proof."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import HubError
from ..hub_client import hub_api
from ..hub_copy import drop
from ..output import counted, say, size_in_words
from ..proof import refuse_unproven
from ..retries import persistently
from ..run import HALF_WRITTEN, Run, stage
from .folder import fill, link_adapter
from .repositories import GGUF, MODEL, Repository, repo_id, repositories
from .upload import compare_with_hub, files_of, hub_errors, published_before, upload


@stage(
    "publish_adapter",
    reads=("publish_to_hub", "repo", "private", "one_repo", "merged", "card_rows"),
    after=("train",),
    facts=("publish_adapter",),
)
def publish_adapter(run: Run) -> None:
    """Upload the adapter, what the training cost, as soon as it is there: export and proof take long, and the runtime may be lost.

    Where the Hub refuses it, that is said and the road goes on: `publish` uploads it with the rest.
    """
    told: dict[str, Any] = {}
    if run.settings.publish_to_hub and run.mark("merge") is None:  # else the whole is about to be uploaded
        with TemporaryDirectory(dir=run.folder, prefix=".publish-", suffix=HALF_WRITTEN) as folder:
            try:
                told = send(fill_early(run, Path(folder)), MODEL, run)
            except HubError as error:
                say(f"publish: the adapter is not uploaded yet, which is tried again at the end. {error}")
    run.record("publish_adapter", **told)


def fill_early(run: Run, folder: Path) -> Path:
    """A folder for the first upload: the model's as far as it is there; or, beside a published training that stays until this one is proven, `adapter/` alone."""
    repo, model, alone = repo_id(run.settings), folder / "model", folder / "alone"
    model.mkdir()
    fill(run, model, MODEL.kind, early=True)
    with hub_errors(repo):
        published = persistently(partial(published_before, repo))
    if all((model / name).is_file() for name in published):
        return model
    say(
        f"publish: {repo} holds another training, which stays until this one is proven; the adapter goes to `adapter/` there"
    )
    link_adapter(run, alone / "adapter")
    return alone


@stage("publish", reads=("publish_to_hub", "repo", "private", "one_repo", "publish_unverified"), after=("card",))
def publish(run: Run) -> None:
    """Upload each publish folder when the settings ask for it, its card last, then read the repository back. Raises HubError."""
    if not run.settings.publish_to_hub:
        run.record("publish", repos=run.facts.get("publish", {}).get("repos", []))  # an upload by hand stays known
        say(f"publish: nothing is uploaded (`publish_to_hub` is off); {run.path('publish')} is ready to be")
        return drop(run.settings)
    refuse_unverified(run)
    wanted = repositories(run.settings)
    refuse_unproven(run, run.path(wanted[-1].folder))  # where the GGUF files are
    sent = [send(run.path(repository.folder), repository, run) for repository in wanted]
    sums = {name: sum(each[name] for each in sent) for name in ("files", "bytes")}
    seconds = round(sum(each["seconds"] for each in sent), 2)
    urls, commits = {each["repo"]: each["url"] for each in sent}, {each["repo"]: each["commit"] for each in sent}
    run.record("publish", repos=[each["repo"] for each in sent], urls=urls, commits=commits, **sums, seconds=seconds)
    if GGUF not in wanted:
        tell_what_stays(repo_id(run.settings, GGUF.suffix))
    drop(run.settings)


def tell_what_stays(repo: str) -> None:
    """Say that a repository of GGUF files is still there, of an earlier upload, which this run does not fill; nothing where there is none, or the Hub does not tell."""
    try:
        with hub_errors(repo):
            there = persistently(partial(published_before, repo))
    except HubError:
        return
    if there:
        say(
            f"publish: {repo}, of an earlier upload, stays as it is; delete it in its settings on the Hub if it is not wanted any more"
        )


def send(folder: Path, repository: Repository, run: Run) -> dict[str, Any]:
    """Upload a folder and read it back; repo, url, commit, files, bytes and seconds. Raises HubError."""
    repo, started = repo_id(run.settings, repository.suffix), time.perf_counter()
    again = f"autosloth publish {run.folder}"
    with hub_errors(repo, again):
        url = upload(folder, repo, run.settings, run.folder)
        commit = compare_with_hub(hub_api(), folder, repo, again)
    sizes = [path.stat().st_size for path in files_of(folder)]
    told = f"{counted(len(sizes), 'file')}, {size_in_words(sum(sizes))}, read back and found equal"
    say(f"publish: {url}, {told}")
    seconds = round(time.perf_counter() - started, 2)
    return {"repo": repo, "url": url, "commit": commit, "files": len(sizes), "bytes": sum(sizes), "seconds": seconds}


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
