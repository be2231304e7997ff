"""settings.yaml in the repository: what runs the training again, with nothing of this machine in it."""

from __future__ import annotations

from ..settings import Settings
from ..values import is_address, is_hub_id, is_jinja, last_part, load_yaml, public_address, yaml_text

SETTINGS = "settings.yaml"
HERE = (
    "storage",
    "hub_checkpoints",
    "keep_hub_checkpoints",
    "repo",
    "one_repo",
    "private",
    "publish_to_hub",
    "publish_unverified",
    "card_rows",
)  # where this run lies and goes
PLACES = ("model", "adapter", "sixteen_bit_model")


def settings_file(settings: Settings, on_hub: list[str] | None = None) -> str:
    """The settings that differ from the defaults, as `autosloth <road> settings.yaml` takes them; of a path only the last part, of an address no user and nothing behind `?`, which may be a key.

    on_hub: which names are on the Hub; without it those that are no file or folder here.
    """
    values = {name: value for name, value in load_yaml(settings.to_yaml(changes_only=True)).items() if name not in HERE}
    values |= {name: public(values[name], on_hub) for name in PLACES if values.get(name)}
    if isinstance(dataset := values.get("dataset"), list):
        values["dataset"] = [{**part, "path": public(part["path"], on_hub)} for part in dataset]
    elif dataset:
        values["dataset"] = public(dataset, on_hub)
    if (template := values.get("chat_template")) and not is_jinja(template):
        values["chat_template"] = last_part(template)
    return f"# autosloth {settings.road} {SETTINGS}\n" + yaml_text({"road": settings.road, **values})


def public(name: str, on_hub: list[str] | None = None) -> str:
    """A model, dataset or adapter as others may know it.

    >>> public("/home/mila/data.jsonl"), public("https://me:word@a.b/c.jsonl?token=1"), public("team/questions")
    ('data.jsonl', 'https://a.b/c.jsonl', 'team/questions')
    """
    if is_address(name):
        return public_address(name)
    is_there = is_hub_id(name) if on_hub is None else name in on_hub
    return name if is_there or name == "demo" else last_part(name)
