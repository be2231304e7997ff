"""An input widget for each kind of setting, for files and for tokens; core ipywidgets only, the same on 7.7 (Colab) and on 8."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from functools import partial
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from ..notebook import find_token, give_token
from ..values import parse_value

RED, GREEN, AMBER, GREY = "#d2372b", "#15864c", "#a86508", "#6f7c89"  # to be read on white and on a dark theme alike


class Maker:
    """Makes the widgets of one form; those that look the same share their layout and their style.

    Each widget, layout and style is a message to the front end, and ZeroMQ drops what a slow one lets wait beyond 1000
    (ZMQ_SNDHWM in zmq_setsockopt(3)): a form with a layout and a style for each widget lost its own display.
    """

    def __init__(self) -> None:
        self.shared: dict[tuple[Any, ...], Any] = {}

    def __call__(self, kind: type, /, *children: Any, style: Any = None, layout: Any = None, **values: Any) -> Any:
        """A widget of this class. style, layout: their traits by name."""
        looks = {"layout": layout or {}} | ({"style": style or {}} if "style" in kind.class_traits() else {})
        keys = {name: (kind if name == "style" else None, *sorted(traits.items())) for name, traits in looks.items()}
        widget = kind(*children, **values, **{name: self.shared.get(keys[name], looks[name]) for name in looks})
        for name, key in keys.items():
            self.shared.setdefault(key, getattr(widget, name))
        return widget


def make_widget(make: Maker, info: Any, suggestions: Iterable[str], title: str) -> Any:
    """An input for a field: by its type, with its choices."""
    import ipywidgets as widgets

    make = partial(
        make,
        description=title,
        style={"description_width": "12em"},
        layout={"width": "32em", "max_width": "calc(100% - 4px)"},
    )
    kind = info.annotation
    if kind is bool:
        return make(widgets.Checkbox, indent=True)
    if kind in (int, float):
        return make({int: widgets.IntText, float: widgets.FloatText}[kind])
    if get_origin(kind) is Literal:
        return make(widgets.Dropdown, options=get_args(kind))
    if get_origin(kind) is list:
        choices = get_args(get_args(kind)[0])
        return make(widgets.SelectMultiple, options=choices, rows=len(choices))
    if suggestions:
        return make(widgets.Combobox, options=list(suggestions), ensure_option=False)
    return make(widgets.Text)


def to_widget(info: Any, value: Any) -> Any:
    """A setting's value as its widget holds it."""
    if get_origin(info.annotation) is dict:
        return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).strip() if value else ""
    if get_origin(info.annotation) is list:
        return tuple(value)
    if isinstance(value, list):
        return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).strip()
    if isinstance(value, int) and takes_numbers(info):
        return str(value)
    return "" if value is None else value


def from_widget(info: Any, value: Any) -> Any:
    """A widget's value as the setting takes it."""
    if get_origin(info.annotation) is dict:
        return (parse_value(value) or {}) if isinstance(value, str) else value
    if get_origin(info.annotation) is list:
        return list(value)
    if isinstance(value, str):
        value = value.strip()
        if get_origin(info.annotation) in (Union, UnionType) and (value.startswith("[") or takes_numbers(info)):
            return parse_value(value)
        return None if not value and info.default is None else value
    return value


def takes_numbers(info: Any) -> bool:
    """Whether a setting takes whole numbers beside something else."""
    return int in [get_args(kind)[0] for kind in get_args(info.annotation) if get_args(kind)]


def token_field() -> Any:
    """Where the token comes from, or a field for one: taken into memory and blanked at once, since front ends save what widgets hold."""
    import ipywidgets as widgets

    source = find_token()
    if source:
        return widgets.HTML(line(GREEN, f"✓ Hugging Face token: from {source}", "2px 0 2px 13em"))
    field = widgets.Password(
        description="Token", continuous_update=False, style={"description_width": "12em"}, layout={"width": "32em"}
    )
    field.placeholder = "hf_…, never written anywhere"
    field.add_class("as-token")
    field.observe(partial(take_token, field), "value")
    return field


def take_token(field: Any, change: dict[str, Any]) -> None:
    """Keep a typed token in memory and blank the field."""
    if change["new"]:
        give_token(change["new"].strip(), "the form")
        field.value = ""
        field.placeholder = "✓ taken for this session; hidden"


def uploaded_file(value: Any) -> tuple[str, bytes] | None:
    """Name and content of the last file in a FileUpload: a dict by name in ipywidgets 7, a tuple of dicts in 8."""
    found = (
        [(name, file["content"]) for name, file in value.items()]
        if isinstance(value, dict)
        else [(file["name"], file["content"]) for file in value]
    )
    return (found[-1][0], bytes(found[-1][1])) if found else None


def empty(upload: Any) -> None:
    """Take the content out of a FileUpload: front ends save what widgets hold."""
    if isinstance(upload.value, dict):
        upload.data, upload.metadata = [], []
        upload.set_trait("value", {})
    else:
        upload.value = ()


def remark(text: str) -> str:
    """A help text as HTML, with what stands between backticks as code."""
    marked = re.sub(r"`(.+?)`", r"<code>\1</code>", html.escape(text))
    return f"<div style='color:{GREY};line-height:1.35;padding:3px 0 0 8px;font-size:12px'>{marked}</div>"


def suggested(words: Mapping[str, str], chosen: str) -> str:
    """The word on the chosen suggestion and, folded below it, that on each, as HTML: the list of a Combobox offers values alone."""
    rows = "".join(
        f"<tr><td style='padding:0 1.2em 0 0'><code>{html.escape(value)}</code></td><td>{html.escape(word)}</td></tr>"
        for value, word in words.items()
    )
    told = [words[chosen]] if chosen in words else []
    return (
        f"<details style='color:{GREY};font-size:12px;line-height:1.5'><summary style='cursor:pointer;display:list-item'>"  # the classic Notebook's own style hides its triangle
        f"{html.escape(' · '.join([*told, 'all suggestions']))}</summary><table style='font-size:12px;color:inherit'>{rows}</table></details>"
    )


def line(colour: str, text: str, margin: str = "0") -> str:
    """A line of text as HTML."""
    return (
        f"<div style='color:{colour};margin:{margin};line-height:1.5;overflow-wrap:anywhere'>{html.escape(text)}</div>"
    )
