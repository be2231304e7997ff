"""The Hugging Face Hub: which repository, whether the token may write to it, and the stage that uploads."""

from __future__ import annotations

import time
from typing import Any

from ..errors import HubError
from ..hub_client import hub_api
from ..output import counted, say, size_in_words
from ..proof import refuse_unproven
from ..retries import persistently
from ..run import Run, stage
from ..settings import Settings
from .upload import NO_TOKEN, compare_with_hub, files_of, hub_errors, upload


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
    with hub_errors(repo, f"autosloth publish {run.folder}"):
        api, url = hub_api(), upload(folder, repo, run.settings)
        commit = compare_with_hub(api, folder, repo, f"autosloth publish {run.folder}")
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
        me = persistently(hub_api().whoami)
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(f"The Hugging Face token of {me['name']} may only read.", NO_TOKEN)
    return me
