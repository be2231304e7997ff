"""settings.yaml in the repository: what runs the training again, with nothing of this machine in it."""

from __future__ import annotations

from collections.abc import Mapping

from ..models import HUB
from ..models import on_hub as is_on_hub
from ..run import Run
from ..settings import Settings
from ..values import is_address, is_hub_id, is_jinja, last_part, load_yaml, public_address, yaml_text

SETTINGS = "settings.yaml"
HERE = (
    "storage",
    "hub_checkpoints",
    "keep_hub_checkpoints",
    "repo",
    "one_repo",
    "publish_to_hub",
    "publish_unverified",
    "report_to",
)  # where this run lies and goes, and who is told; not what keeps rows from the public, which is to hold for who runs it again
PLACES = ("model", "adapter", "sixteen_bit_model")


def settings_file(
    settings: Settings,
    on_hub: list[str] | None = None,
    base: str | None = None,
    datasets: Mapping[str, str] | None = None,
) -> str:
    """The settings that differ from the defaults, as `autosloth <road> settings.yaml` takes them; of a path only the last part, of an address no user and nothing behind `?`, which may be a key.

    on_hub: which names are on the Hub; without it those that are no file or folder here. base: the commit of the model that was trained, which becomes `revision`;
    datasets: the commit of each that is on the Hub, told on top, as no setting takes one.
    """
    values = {name: value for name, value in load_yaml(settings.to_yaml(changes_only=True)).items() if name not in HERE}
    values |= {name: public(values[name], on_hub) for name in PLACES if values.get(name)}
    if isinstance(dataset := values.get("dataset"), list):
        values["dataset"] = [{**part, "path": public(part["path"], on_hub)} for part in dataset]
    elif dataset:
        values["dataset"] = public(dataset, on_hub)
    if (template := values.get("chat_template")) and not is_jinja(template):
        values["chat_template"] = last_part(template)
    pinned = {"model": settings.model, "revision": base} if base else {}
    rows = [
        f"# The rows of {name} as they were: {HUB}/datasets/{name}/tree/{commit} (by its name they come as they are now)\n"
        for name, commit in (datasets or {}).items()
    ]
    text = yaml_text({"road": settings.road, **pinned, **values, **pinned})
    return f"# autosloth {settings.road} {SETTINGS}\n{''.join(rows)}{text}"


def base_commit(run: Run) -> str | None:
    """The commit of `model` that was trained; None for one that is not on the Hub."""
    commit = run.facts["train"].get("base", {}).get("commit")
    return commit if is_on_hub(run.facts.get("origin", {}), run.settings.model) else None


def dataset_commits(run: Run) -> dict[str, str]:
    """The commit of each dataset of a run that is on the Hub, by its id."""
    data, parts = run.facts["data"], run.settings.parts
    told = data.get("revisions") or ({parts[0]["path"]: data["revision"]} if data.get("revision") else {})
    return {name: commit for name, commit in told.items() if is_on_hub(run.facts.get("origin", {}), name)}


def public(name: str, on_hub: list[str] | None = None) -> str:
    """A model, dataset or adapter as others may know it.

    >>> public("/home/mila/data.jsonl"), public("https://me:word@a.b/c.jsonl?token=1"), public("team/questions")
    ('data.jsonl', 'https://a.b/c.jsonl', 'team/questions')
    """
    if is_address(name):
        return public_address(name)
    is_there = is_hub_id(name) if on_hub is None else name in on_hub
    return name if is_there or name == "demo" else last_part(name)
