"""The form's values, saved at each change in a settings file that `autosloth` takes too, so that nothing typed is lost."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import SettingsError
from ..notebook import DRIVE
from ..run import write_text
from ..settings import ROADS, Settings
from ..values import (
    allowed,
    environment_values,
    read_settings_file,
    refuse_unknown,
    refuse_unknown_variables,
    variable,
    yaml_text,
)

DRIVE_DELAY = 1.0  # seconds that writing to Drive waits for more: it takes about as long as the typing of a letter
SWITCH = "# @param "  # lines of the settings file that tell how the notebook's own switches stood


class Store:
    """What was chosen for each setting, from least to most: default, settings file, environment, changed switch of the notebook, widget.

    notes: what was wrong in the settings file, a sentence each; problems: the fields that are wrong now, a sentence
    each (the empty name for what is about no single field); settings: the last ones that were right.
    """

    def __init__(self, road: type[Settings], path: Path):
        self.road, self.path = road, path
        self.chosen: dict[str, Any] = {}
        self.live: set[str] = set()  # chosen in this session: wins over the environment
        self.switches: dict[str, Any] = {}
        self.notes: list[str] = []
        self.timer: threading.Timer | None = None
        self.form: Any = None  # the newest view
        self.settings, self.problems = road(), {}
        if path.is_file():
            self.take(self.read())
        self.resolve()

    def read(self) -> dict[str, Any]:
        """The settings file's values; field by field where it is damaged as a whole."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            self.notes.append(f"{self.path.name} cannot be read ({error.strerror}): the defaults are used.")
            return {}
        self.switches = fields_of("\n".join(re.findall(rf"^{SWITCH}(.*)$", text, re.M)))
        try:
            return read_settings_file(self.path)
        except SettingsError as error:
            kept = self.path.with_suffix(".damaged.yaml")
            self.path.replace(kept)
            self.notes.append(f"{error.what} What can be read of it is used; it is kept as {kept.name}.")
            return fields_of(text)

    def take(self, values: Mapping[str, Any]) -> None:
        """Choose these values, but for those that are no settings or are not allowed: each gets a note."""
        for name, value in values.items():
            try:
                refuse_unknown({name: value}, self.road)
                wrong = self.wrong({**self.chosen, name: value})
            except SettingsError as error:
                self.notes.append(f"{error.what} It is left out.")
                continue
            if name in wrong:
                self.notes.append(f"{wrong[name]} Its default is used.")
            else:
                self.chosen[name] = value

    def wrong(self, values: Mapping[str, Any]) -> dict[str, str]:
        """What is wrong with these values, by field; under the empty name what is wrong with several together."""
        try:
            self.road(**values)
        except ValidationError as error:
            return {
                str(problem["loc"][0]) if problem["loc"] else "": sentence(problem)
                for problem in reversed(error.errors(include_url=False))
            }
        return {}

    def switch(self, switches: Mapping[str, Any]) -> None:
        """Choose what the notebook's own switches say where they say something else than last time."""
        defaults = {name: self.road.model_fields[name].get_default(call_default_factory=True) for name in switches}
        before = {**defaults, **self.switches}
        self.switches = dict(switches)
        for name, value in switches.items():
            if value != before[name]:
                self.choose(name, value)

    def choose(self, name: str, value: Any) -> None:
        """Take one value and keep it."""
        self.chosen[name] = value
        self.live.add(name)
        self.resolve()
        self.keep()

    def given(self) -> dict[str, Any]:
        """Every value that is no default."""
        outer = {name: value for name, value in environment_values(self.road).items() if name not in self.live}
        return {**self.chosen, **outer}

    def resolve(self) -> None:
        """Check what was chosen: `problems`, and `settings` out of what is right."""
        given = self.given()
        self.problems = self.wrong(given)
        try:
            refuse_unknown_variables(name for road in ROADS.values() for name in road.model_fields)
        except SettingsError as error:
            self.problems[""] = str(error)
        right = {name: value for name, value in given.items() if name not in self.problems}
        if not self.wrong(right):
            self.settings = self.road(**right)

    def shown(self, name: str) -> Any:
        """The value of a setting as it stands now, right or wrong."""
        return self.given()[name] if name in self.problems else getattr(self.settings, name)

    def variables(self) -> list[str]:
        """The environment variables that settings are taken from."""
        return [variable(name) for name in environment_values(self.road) if name not in self.live]

    def sources(self) -> str:
        """Where the settings come from, in words, where nobody uses the form."""
        given = [*self.variables(), *([self.path.name] if self.path.is_file() else [])]
        return f"those of {', '.join(given)}, and the defaults" if given else "the defaults"

    def places(self) -> str:
        """Where what is wrong is to be corrected, in words, where nobody uses the form."""
        file = self.path.name if self.path.is_file() else "the cell of the form"
        outer = [name for name in self.problems if variable(name) in self.variables()]
        wrong = [variable(name) if name in outer else f"`{name}` in {file}" for name in self.problems if name]
        return f"Correct {', '.join(wrong)} and run it again." if wrong else "Run it again when that is corrected."

    def text(self) -> str:
        """The settings file."""
        switches = "".join(
            f"{SWITCH}{name}: {yaml.safe_dump(value).splitlines()[0]}\n" for name, value in self.switches.items()
        )
        chosen = yaml_text(self.chosen) if self.chosen else ""
        return f"# Written by the form; what is not here has its default.\n{switches}{chosen}"

    def keep(self) -> None:
        """Write the settings file: now, or on Drive a moment later."""
        if not self.path.is_relative_to(DRIVE):
            return self.write()
        self.stop_timer()
        self.timer = threading.Timer(DRIVE_DELAY, self.write)
        self.timer.start()

    def stop_timer(self) -> None:
        """Take back what would be written a moment later; its own thread may be at it already."""
        timer, self.timer = self.timer, None
        if timer:
            timer.cancel()

    def write(self) -> None:
        """Write the settings file now; where that fails, say so and go on with what is in memory."""
        self.stop_timer()
        try:
            write_text(self.path, self.text())
        except OSError as error:
            note = f"{self.path} cannot be written ({error.strerror}): the settings last as long as this session."
            if note not in self.notes:
                self.notes.append(note)


def fields_of(text: str) -> dict[str, Any]:
    """What can be read of a damaged settings file: each `name: value` that is valid YAML by itself.

    >>> fields_of("seed: 1\\nsplit: [\\nrepo: a")
    {'seed': 1, 'repo': 'a'}
    """
    found: dict[str, Any] = {}
    for block in re.findall(r"^\w+:.*(?:\n(?:[ \t-].*)?$)*", text, re.M):
        try:
            content = yaml.safe_load(block)
        except yaml.YAMLError:
            continue
        if isinstance(content, dict):
            found |= content
    return found


def sentence(problem: Mapping[str, Any]) -> str:
    """One of pydantic's errors as a sentence."""
    given = f"{problem['loc'][0]} is {shortened(problem['input'])}, but " if problem["loc"] else ""
    return f"{given}{allowed(problem)}."


def shortened(value: Any) -> str:
    """A value in a message, of at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
