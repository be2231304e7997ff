"""Which repositories of the Hugging Face Hub a run fills, and whether the token may write to them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from ..errors import HubError
from ..hub_client import hub_api
from ..hub_copy import copy_name, refuse_foreign_copy
from ..retries import persistently
from ..run import GGUF_FOLDER
from ..settings import Settings
from .upload import NO_TOKEN, hub_errors, refuse_taken

Kind = Literal["model", "gguf", "both"]


@dataclass(frozen=True)
class Repository:
    """What of a run goes into one repository: the model, its GGUF files, or both; from which folder; and what its name ends in."""

    kind: Kind
    folder: str
    suffix: str = ""


MODEL, GGUF = Repository("model", "publish"), Repository("gguf", GGUF_FOLDER, "-GGUF")


def repositories(settings: Settings) -> list[Repository]:
    """The repositories of a run, in the order in which they are uploaded."""
    if not settings.quantizations:
        return [MODEL]
    return [Repository("both", "publish")] if settings.one_repo else [MODEL, GGUF]


def repo_id(settings: Settings, suffix: str = "") -> str:
    """`owner/name`, and what the name ends in; the owner is the token's account unless `repo` names one. Raises HubError without a token, or for a name that the Hub does not take."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = (settings.repo or settings.run_name) + suffix
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
    """Raises HubError when the token may not write to one of the repositories of a run, or one is there that it must not fill."""
    published = [repo_id(settings, each.suffix) for each in repositories(settings)] if settings.publish_to_hub else []
    copies = [copy_name(settings, account()["name"])] if settings.hub_checkpoints else []
    for repo in [*published, *copies]:
        refuse_foreign(account(), repo)
    for repo in published:
        with hub_errors(repo):
            persistently(partial(refuse_taken, repo, settings))
    for repo in copies:
        refuse_foreign_copy(repo)


def refuse_foreign(me: dict[str, Any], repo: str) -> None:
    """Raises HubError when the token of this account may not write to a repository."""
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
    with hub_errors("the account of the token"):
        me = persistently(hub_api().whoami)
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(f"The Hugging Face token of {me['name']} may only read.", NO_TOKEN)
    return me
