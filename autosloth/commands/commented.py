"""The settings of a road as a file to begin with: each with its help as a comment, in the groups of the form."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from ..settings import Settings
from ..values import in_words, shown, yaml_text

WIDTH = 100  # of a comment


def commented(settings: Settings) -> str:
    """YAML that loads as these settings, in which every setting of the road stands with its help.

    Live are those that are not as they would be by default, and those that most people touch if nothing else changes their default: `preset: paper`,
    written into the file later, is to bring its own along. The others are commented out, with what they are now.
    """
    road = type(settings)
    schema, values = road.model_json_schema()["properties"], settings.model_dump()
    defaults, followers = defaults_of(settings), followers_of(settings)
    lines = comment(
        f"Settings of `autosloth {road.road}`. What is commented out has the value that stands there; "
        f"take its `#` away to set it. `autosloth {road.road} --help` tells which follow others."
    )
    groups: dict[str, list[str]] = {}
    for name, field in road.model_fields.items():
        groups.setdefault(field.json_schema_extra["group"], []).append(name)
    for group, names in groups.items():
        lines += ["", f"# ---- {group} ----"]
        for name in names:
            live = values[name] != defaults[name] or (road.model_fields[name].json_schema_extra["front"] and name not in followers)  # fmt: skip
            lines += ["", *told_of(name, settings, schema[name], defaults[name], live)]
    return "\n".join(lines) + "\n"


def told_of(name: str, settings: Settings, schema: Mapping[str, Any], default: Any, live: bool) -> list[str]:
    """The lines of one setting: its help, its default where it is another, its value."""
    value, takes = getattr(settings, name), in_words(schema)
    lines = comment(f"{schema['description']}{f' Takes {takes}.' if takes else ''}")
    if value != default:
        lines += comment(f"The default is {shown(default)}.")
    elif name == "run_name":
        value = ""  # it is to follow model and dataset
    text = yaml_text({name: value}).rstrip("\n").split("\n")  # not at other line separators, which a value may hold
    return lines + [line if live else f"#{line}" for line in text]


def comment(text: str) -> list[str]:
    """A text as lines of comments."""
    return textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_long_words=False)


def defaults_of(settings: Settings) -> dict[str, Any]:
    """What each setting would be if it were not set, beside the others as they are."""
    declared = {name: field.get_default(call_default_factory=True) for name, field in settings.__class__.model_fields.items()}  # fmt: skip
    return declared | {"run_name": settings._default_run_name()} | settings.defaults_beside(settings.model_dump())


def followers_of(settings: Settings) -> set[str]:
    """The settings whose default another setting can change."""
    beside = [*settings.other_defaults().values(), settings.defaults_beside(settings.model_dump())]
    return {"gradient_accumulation"}.union(*beside)
