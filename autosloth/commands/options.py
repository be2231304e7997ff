"""The settings of a road as options of a command, `--learning-rate 1e-4` and `--merged/--no-merged`, all from the declaration in settings.py: how they are read, told by `--help`, and completed by a shell."""

from __future__ import annotations

import functools
import inspect
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo
from rich.markup import escape
from typer.core import TyperCommand

from ..settings import ON_THE_HUB, Settings
from ..values import flag, in_words, kinds_of, read_texts, shown, variable

METAVARS = {"string": "TEXT", "integer": "INTEGER", "number": "NUMBER", "array": "LIST", "object": "MAPPING"}
SETTINGS_FILES = (".yaml", ".yml", ".json")
COMPLETION_WIDTH = 60  # of the word on an option that a shell completes
NAMES_WIDTH = 28  # of the column of options in a help; what is longer goes on below


def folder_of_runs() -> Path:
    """Where runs are kept when nothing else is said: `storage`, by its variable or its default."""
    told = os.environ.get(variable("storage")) or ON_THE_HUB
    return Path(Settings.model_fields["storage"].default if told == ON_THE_HUB else told).expanduser()


def complete_runs(incomplete: str) -> list[str]:
    """The run folders in `storage` that begin so."""
    found = (path.parent for path in folder_of_runs().glob("*/settings.json"))
    return sorted(str(path) for path in found if str(path).startswith(incomplete))


def complete_settings_files(incomplete: str) -> list[str]:
    """The YAML and JSON files that begin so, and the folders on the way to others."""
    above = os.path.dirname(incomplete)
    with_slash = os.path.join(above, "") if above else ""
    found = [path for path in Path(above or ".").expanduser().glob("*") if path.is_dir() or path.suffix in SETTINGS_FILES]  # fmt: skip
    named = [f"{with_slash}{path.name}{'/' if path.is_dir() else ''}" for path in found]
    return sorted(name for name in named if name.startswith(incomplete) and not name.startswith("."))


def with_settings(road: type[Settings], act: Callable[[Settings], None]) -> Callable[..., None]:
    """A command that takes a file of settings, `--set` and an option for each setting of the road, and hands the settings to `act`."""

    def command(settings: Path | None, set: list[str] | None, **options: Any) -> None:
        act(load_settings(road, settings, set, options))

    command.__signature__ = inspect.Signature(list(parameters(road)))
    return command


@functools.cache
def parameters(road: type[Settings]) -> tuple[inspect.Parameter, ...]:
    """What a command that takes the settings of a road has in its signature, for typer."""

    def complete_pair(incomplete: str) -> list[str]:
        return [f"{name}=" for name in road.model_fields if name.startswith(incomplete)]

    file = typer.Argument(
        metavar="[SETTINGS.yaml]",
        autocompletion=complete_settings_files,
        help="Settings in YAML or JSON; without it the defaults. `autosloth init` writes one.",
    )
    pairs = typer.Option(
        "--set",
        metavar="KEY=VALUE",
        autocompletion=complete_pair,
        help="One setting by its name in a file; may be given several times.",
    )
    schema = road.model_json_schema()["properties"]
    kinds = {"settings": Annotated[Path | None, file], "set": Annotated[list[str] | None, pairs]}
    kinds |= {name: option(name, field, schema[name]) for name, field in road.model_fields.items()}
    keyword = inspect.Parameter.KEYWORD_ONLY
    return tuple(inspect.Parameter(name, keyword, default=None, annotation=kind) for name, kind in kinds.items())


def option(name: str, field: FieldInfo, schema: Mapping[str, Any]) -> Any:
    """One setting as typer takes it: text that is read later, so that what is wrong with it is told in our own words; a boolean is a pair of flags."""
    kinds, known = kinds_of(schema), field.json_schema_extra
    default = "from model and dataset" if name == "run_name" else shown(field.get_default(call_default_factory=True))
    takes = in_words(schema)
    told = f"{field.description}{f' Takes {takes}.' if takes else ''} [default: {default}]"
    choices = choices_of(schema) or known["suggestions"]

    def complete(incomplete: str) -> list[tuple[str, str]]:
        before = incomplete[: incomplete.rfind(",") + 1] if "array" in kinds else ""
        words = choices if isinstance(choices, Mapping) else dict.fromkeys(choices, "")
        return [(f"{before}{choice}", word) for choice, word in words.items()]

    flags = f"{flag(name)}/--no-{flag(name).removeprefix('--')}" if kinds == {"boolean"} else flag(name)
    kind = bool | None if kinds == {"boolean"} else list[str] | None if kinds & {"array", "object"} else str | None
    metavar = "CHOICE" if "enum" in schema else "|".join(METAVARS[each] for each in METAVARS if each in kinds)
    return Annotated[kind, typer.Option(flags, help=told, metavar=metavar or None, rich_help_panel=known["group"], show_default=False, autocompletion=complete)]  # fmt: skip


def choices_of(schema: Mapping[str, Any]) -> list[str]:
    """The names that a setting or each of a list takes, where they are given."""
    return schema.get("enum") or schema.get("items", {}).get("enum") or []


def load_settings(
    road: type[Settings], path: Path | None, pairs: Iterable[str] | None, options: Mapping[str, Any]
) -> Settings:
    """The settings of a file, of `--set` and of options, which stand at one level.

    options: the texts given, by setting; a list of them where several may be given, True or False of a flag, None where none was given.
    Raises BadParameter for a pair without `=` and for a setting that is given both ways, SettingsError as `Settings.load` does.
    """
    texts: dict[str, list[str]] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise typer.BadParameter(f"{pair!r} has no `=`; write --set key=value.", param_hint="--set")
        texts[key.strip()] = [value]
    given = {name: value for name, value in options.items() if value is not None}
    if both := [name for name in given if name in texts]:
        raise typer.BadParameter(f"`{both[0]}` is given by `--set` too; give it once.", param_hint=flag(both[0]))
    flags = {name: value for name, value in given.items() if isinstance(value, bool)}
    texts |= {name: value if isinstance(value, list) else [value] for name, value in given.items() if name not in flags}
    schema = road.model_json_schema()["properties"]
    read = {name: read_texts(value, schema.get(name, {})) for name, value in texts.items()}
    return road.load(path, overrides=read | flags, options=given)


def other_defaults_help(road: type[Settings]) -> str:
    """The sets of defaults that other values of a setting bring along, a paragraph each."""
    every = {
        name: ", ".join(f"{field} {shown(value)}" for field, value in values.items())
        for name, values in road.other_defaults().items()
    }
    return "\n\n".join(f"With `{name}` the defaults are: {told}." for name, told in every.items())


class RoadCommand(TyperCommand):
    """A command whose help shows its options in the groups of the form, in two columns that narrow terminals have room for."""

    def shell_complete(self, ctx: typer.Context, incomplete: str) -> list[Any]:
        """The names of options, with a word on each: a shell has a line for it, and typer takes it for markup."""
        found = super().shell_complete(ctx, incomplete)
        for item in found:
            item.help = escape(textwrap.shorten(item.help or "", COMPLETION_WIDTH, placeholder=" ..."))
        return found

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:
        from rich.console import Console
        from rich.padding import Padding
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        panels: dict[str, Table] = {}
        for each in self.get_params(ctx):
            title = "Arguments" if each.param_type_name == "argument" else each.rich_help_panel or "Options"
            table = panels.setdefault(title, Table.grid(padding=(0, 2)))
            if not table.columns:
                table.add_column(width=NAMES_WIDTH)
                table.add_column()
            names, told = each.get_help_record(ctx)
            text = Text(told)
            text.highlight_regex(r"\[default: .*\]$", "dim")
            table.add_row(Text(names, "bold cyan", overflow="fold"), text)
        console = Console()
        console.print(Padding(Text(self.get_usage(ctx)), 1))
        console.print(Padding(Text(self.help or ""), (0, 1, 1, 1)))
        for title, table in panels.items():
            console.print(Panel(table, title=title, title_align="left", border_style="dim"))
        console.print(Padding(Text(self.epilog or ""), 1))
