"""settings.yaml in the repository: what runs the training again, with nothing of this machine in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..settings import Settings
from ..values import is_address, is_hub_id, is_jinja, load_yaml, yaml_text

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


def settings_file(settings: Settings) -> str:
    """The settings that differ from the defaults, as `autosloth <road> settings.yaml` takes them; of a path only the last part, of an address no user and nothing behind `?`, which may be a key."""
    values = {name: value for name, value in load_yaml(settings.to_yaml(changes_only=True)).items() if name not in HERE}
    values |= {name: public(values[name]) for name in PLACES if values.get(name)}
    if isinstance(dataset := values.get("dataset"), list):
        values["dataset"] = [{**part, "path": public(part["path"])} for part in dataset]
    elif dataset:
        values["dataset"] = public(dataset)
    if "/" in (template := values.get("chat_template", "")) and not is_jinja(template):
        values["chat_template"] = Path(template).name
    return f"# autosloth {settings.road} {SETTINGS}\n" + yaml_text({"road": settings.road, **values})


def public(name: Any) -> str:
    """A model, dataset or adapter as others may know it.

    >>> public("/home/mila/data.jsonl"), public("https://me:word@a.b/c.jsonl?token=1"), public("team/questions")
    ('data.jsonl', 'https://a.b/c.jsonl', 'team/questions')
    """
    if is_address(name):
        return re.sub("//[^/]*@", "//", name.partition("?")[0])
    return name if is_hub_id(name) or name == "demo" else Path(name).name
