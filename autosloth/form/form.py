"""The form: the settings of a road as widgets, bound to a store. Core ipywidgets only, the same on 7.7 (Colab) and on 8."""

from __future__ import annotations

import contextlib
import functools
import html
import shlex
import textwrap
import threading
import time
from pathlib import Path
from typing import Any, Literal

import yaml

from ..child_process import Ended, run_apart
from ..errors import AutoSlothError, SettingsError
from ..hardware import GPU, first_gpu
from ..hub_client import is_offline
from ..notebook import drive_folder, front_end_attached, mount_drive
from ..output import say
from ..run import write_text
from ..settings import ROADS, Settings
from .beside import about_dataset, about_memory, about_model
from .glance import Glance
from .store import Store
from .widgets import (
    AMBER,
    GREEN,
    GREY,
    RED,
    Maker,
    empty,
    from_widget,
    line,
    make_widget,
    remark,
    suggested,
    to_widget,
    token_field,
    uploaded_file,
)

NAMES = {"sft": "AutoSloth-SFT", "dpo": "AutoSloth-DPO", "spin": "SPIN-iter"}  # of the notebooks
GROUPS = ("Model", "Data", "Training", "Export", "Publish")
LATE = 0.3  # seconds that a widget's last message may need (ipykernel 7.0 to 7.3 takes it in another thread)
# By which settings what stands beside model and dataset is found out, and what does.
LOOKED_UP = {
    "model": ("autosloth.models.glance", ("model", "revision", "sixteen_bit_model", "adapter", "target_modules")),
    "dataset": ("autosloth.data.glance", ("dataset", "dataset_config", "split", "columns", "pairs")),
}
DEMO = "AutoSloth's own tiny base, made here in about a minute: to see it all work, without a GPU"
UPLOAD_LIMIT = "or upload a file of at most 8 MB; put what is larger on Drive and give its path, or its address."

_stores: dict[Path, Store] = {}  # outlive the form cell, which is run again by each Run all
_stopped: set[Path] = set()  # the stores whose first Run all was stopped at the form


class Paused(AutoSlothError):
    """The first Run all stops at the form, as its switch says."""


def open_form(
    road: Literal["sft", "dpo", "spin"], first_run_all: Literal["go", "stop"] = "go", **switches: Any
) -> Form:
    """The form of a road, with what was chosen before. switches: settings that the notebook's cell gives itself."""
    mount_drive(str(switches.get("storage", "")))
    path = settings_path(f"{NAMES[road]}.yaml")
    if path not in _stores:
        _stores[path] = Store(ROADS[road], path)
    _stores[path].switch(switches)
    return Form(_stores[path], road, first_run_all)


def settings_path(name: str) -> Path:
    """Where a form keeps its settings: on the mounted Drive, else here. What was chosen here before the mount moves there."""
    here, folder = Path.cwd() / name, drive_folder()
    if folder is None:
        return here
    there = folder / name
    if here.is_file() and not (there.is_file() and there.stat().st_mtime > here.stat().st_mtime):
        write_text(there, here.read_text(encoding="utf-8", errors="replace"))
        here.unlink()
    return there


class Form:
    """One view of a store. The last line of a cell shows it; `settings()` is what the next cell goes on with."""

    def __init__(self, store: Store, road: str, first_run_all: str = "go"):
        self.store, self.road, self.first_run_all = store, road, first_run_all
        self.updating = False  # while values go to the widgets, not from them
        if store.form:
            store.form.leave()
        self.make = Maker()
        self.told: dict[str, dict[str, Any] | None] = {}  # of model and dataset
        self.checked: Settings | None = None
        watched = LOOKED_UP.items() if front_end_attached() else ()
        self.glances = {name: Glance(*how, functools.partial(self.tell, name)) for name, how in watched}
        self.fields = {name: Field(self, name) for name in store.road.model_fields}
        self.token = token_field() if front_end_attached() else None
        self.root = self.build()
        store.form = self
        self.refresh()

    def build(self) -> Any:
        """All widgets in one box: a summary, the groups, and below them the settings as a file."""
        import ipywidgets as widgets

        make = self.make
        self.summary, self.file = make(widgets.HTML), make(widgets.HTML)
        self.load = make(
            widgets.FileUpload,
            accept=".yaml,.yml,.json",
            description="Load a settings file",
            layout={"width": "16em"},
        )
        self.load.add_class("as-load")
        self.load.observe(self.load_file, "value")
        groups = [self.group(title) for title in GROUPS]
        self.check_button = make(widgets.Button, description="Check", layout={"width": "10em"})
        self.check_button.add_class("as-check")
        self.check_button.on_click(lambda _: self.check())
        self.found = make(widgets.HTML)
        hint = make(
            widgets.HTML, remark("Find what would stop the run, without starting it: what the next cell does first.")
        )
        checks = make(
            widgets.VBox, [make(widgets.HBox, [self.check_button, hint]), self.found], layout={"margin": "10px 0 0"}
        )
        file = make(widgets.HBox, [self.file], layout={"margin": "10px 0 0"})
        root = make(widgets.VBox, [self.summary, *groups, checks, file, self.load], layout={"max_width": "64em"})
        root.add_class("autosloth")
        return root

    def group(self, title: str) -> Any:
        """A heading, the fields of this group that most people touch, and the others folded under More."""
        import ipywidgets as widgets

        mine = [field for field in self.fields.values() if field.extra["group"] == title]
        front, more = ([field.row for field in mine if field.extra["front"] == where] for where in (True, False))
        make, style = self.make, "font-weight:600;font-size:15px;margin:12px 0 2px"
        heading = make(widgets.HTML, f"<div style='{style}'>{title}</div>")
        if title == "Publish" and self.token:
            front.append(self.token)
        folded = make(widgets.Accordion, children=[make(widgets.VBox, more)], selected_index=None)
        titles = ", ".join(field.title for field in mine if not field.extra["front"])
        folded.set_title(0, textwrap.shorten(f"More: {titles}", 90, placeholder=" …"))
        folded.add_class(f"as-more-{title.lower()}")
        return make(widgets.VBox, [heading, *front, *([folded] if more else [])])

    def refresh(self) -> None:
        """Bring every widget and message to what the store holds."""
        self.updating = True
        try:
            for field in self.fields.values():
                field.refresh()
        finally:
            self.updating = False
        self.summary.value = self.summarised()
        self.file.value = self.as_file()
        for name, glance in self.glances.items():
            demo = name == "model" and self.store.settings.model == "demo"  # which would be made
            if name not in self.store.problems and not demo:
                glance.follow(self.store.settings)
            self.show_beside(name)
        if self.checked not in (None, self.store.settings):
            self.checked, self.found.value = None, ""

    def tell(self, name: str, answer: dict[str, Any] | None) -> None:
        """Take what was found out of the model or the dataset."""
        self.told[name] = answer
        self.show_beside(name)

    def show_beside(self, name: str) -> None:
        """What is known of the model, with the memory that these settings take of the GPU, or of the dataset."""
        told, settings, shown = self.told.get(name), self.store.settings, ""
        if name == "model" and settings.model == "demo":
            shown = line(GREY, DEMO)
        elif told and "problem" in told:
            shown = line(AMBER, told["problem"])
        elif told:
            shown = (
                about_dataset(told, settings)
                if name == "dataset"
                else line(GREY, about_model(told)) + about_memory(settings, told, gpu_at_hand())
            )
        self.fields[name].beside.value = shown

    def leave(self) -> None:
        """Another form takes the place of this one."""
        for glance in self.glances.values():
            glance.leave()

    def check(self) -> None:
        """Let `check` look at the settings as they stand, in a process of its own, and show what it finds."""
        if self.store.problems:
            self.found.value = line(RED, "Correct what is marked above first.")
            return
        self.checked = settings = self.store.settings
        self.check_button.disabled, self.found.value = True, line(GREY, "Checking: it may take a minute …")
        threading.Thread(target=self.look_through, args=(settings,), daemon=True).start()

    def look_through(self, settings: Settings) -> None:
        """Show what `check` finds of these settings, if they still stand there."""
        request = {"road": self.road, "values": settings.model_dump()}
        try:
            ended = run_apart("autosloth.check", request, online=not is_offline(), bare=False)
        except OSError as error:  # no process, no memory
            ended = Ended(1, {}, str(error))
        self.check_button.disabled = False
        if settings == self.store.settings:
            self.found.value = what_was_found(ended)

    def summarised(self) -> str:
        """One line on top: whether all is right, what is chosen, where it is kept; and what was wrong in the file."""
        store, notes = self.store, "".join(line(AMBER, note) for note in self.store.notes)
        if store.problems:
            wrong = ", ".join(self.fields[name].title for name in store.problems if name)
            together = store.problems.get("", "")
            return notes + line(RED, f"✗ To correct: {f'{wrong}.' if wrong else together}")
        chosen = f"{len(store.given())} chosen, the others are the defaults" if store.given() else "the defaults"
        kept = f", kept in {store.path.name}" if store.chosen else ""
        return notes + line(GREEN, f"✓ Ready: {chosen}{kept}. Run all goes on with what stands here.")

    def as_file(self) -> str:
        """The settings file and the command that takes it."""
        command = f"autosloth {self.road} {shlex.quote(self.store.path.name)}"
        text = html.escape(self.store.text())
        return (
            f"<div style='color:{GREY};line-height:1.5'>The same without a notebook: <code>{html.escape(command)}</code>"
            f"<details><summary style='cursor:pointer'>{html.escape(str(self.store.path))}</summary>"
            f"<pre style='margin:4px 0;padding:8px;background:#f6f8fa;color:#1f2933;line-height:1.4'>{text}</pre></details></div>"
        )

    def load_file(self, change: dict[str, Any]) -> None:
        """Take over an uploaded settings file, field by field."""
        uploaded = uploaded_file(change["new"])
        if uploaded is None:
            return
        name, content = uploaded
        empty(self.load)
        self.store.notes.clear()
        try:
            values = yaml.safe_load(content.decode("utf-8"))
        except (UnicodeDecodeError, yaml.YAMLError):
            values = None
        if isinstance(values, dict):
            self.store.chosen.clear()
            self.store.take(values)
            self.store.live = set(self.store.chosen)
            self.store.resolve()
            self.store.keep()
        else:
            self.store.notes.append(f"{name} is no settings file: it is left out.")
        self.refresh()

    def settings(self) -> Settings:
        """The settings as they stand, and what they are; what Run all goes on with.

        Raises Paused when the first Run all is to stop here, SettingsError when a value is wrong. Headless it waits for nobody.
        """
        if front_end_attached():
            time.sleep(LATE)
        store = self.store
        store.write() if store.timer else None
        if self.first_run_all == "stop" and front_end_attached() and store.path not in _stopped:
            _stopped.add(store.path)
            raise Paused("Paused at the form, as its switch says.", "Fill it in, then choose Run all again.")
        if store.problems:
            form = "Correct them in the form above, then run this cell again."
            raise SettingsError(" ".join(store.problems.values()), form if front_end_attached() else store.places())
        mount_drive(store.settings.storage)
        changes = store.settings.to_yaml(changes_only=True).rstrip() if store.given() else ""
        say(f"settings: the defaults, but for\n{changes}" if changes else "settings: the defaults")
        for reason in store.settings.reasons():
            say(reason)
        say(f"settings: the run folder is {store.settings.folder}")
        return store.settings

    def _ipython_display_(self) -> None:
        from IPython.display import display

        if front_end_attached():
            return display(self.root)
        say(f"form: nobody is watching, so the settings are {self.store.sources()}")


@functools.cache
def gpu_at_hand() -> GPU | None:
    """The GPU of this machine, asked for once."""
    return first_gpu()


def what_was_found(ended: Ended) -> str:
    """What `check` found, as HTML."""
    if not ended.answer or "error" in ended.answer:
        return line(AMBER, f"The check came to no end ({ended.reason}): run the next cell, which does the same.")
    problems = "".join(
        line(RED, f"✗ {what}") + line(GREY, todo, "0 0 4px 1.2em") for what, todo in ended.answer["problems"]
    )
    said = "".join(line(GREY, told) for told in ended.answer["said"])
    return (problems or line(GREEN, "✓ No problem found.")) + said


class Field:
    """One setting in the form: its widget, its help beside it, its message below."""

    def __init__(self, form: Form, name: str):
        import ipywidgets as widgets

        self.form, self.name, self.info = form, name, form.store.road.model_fields[name]
        self.extra = self.info.json_schema_extra
        self.title = self.info.title or name.replace("_", " ").capitalize()
        suggestions = self.extra["suggestions"]
        self.words = suggestions if isinstance(suggestions, dict) else {}
        make = form.make
        self.widget = make_widget(make, self.info, suggestions, self.title)
        self.widget.add_class(f"as-{name.replace('_', '-')}")
        self.message = make(widgets.HTML)
        how = " Hold Ctrl (or Cmd) to take several." if isinstance(self.widget, widgets.SelectMultiple) else ""
        help = remark(self.info.description + how)
        help = make(widgets.HTML, help, layout={"flex": "1 1 18em", "min_width": "12em"})
        rows = [make(widgets.HBox, [self.widget, help], layout={"flex_flow": "row wrap"})]
        if name == "dataset":
            rows.append(self.upload_row())
        if self.words:
            self.word = make(widgets.HTML, layout={"margin": "0 0 0 12.2em"})
            rows.append(self.word)
        if name in LOOKED_UP:
            self.beside = make(widgets.HTML, layout={"margin": "0 0 0 12.2em"})
            self.beside.add_class(f"as-beside-{name}")
            rows.append(self.beside)
        self.row = make(widgets.VBox, [*rows, self.message])
        self.widget.observe(self.changed, "value")

    def upload_row(self) -> Any:
        """A button that takes a dataset from the user's own disk, and what it takes."""
        import ipywidgets as widgets

        make = self.form.make
        self.upload = make(widgets.FileUpload, description="Upload", layout={"width": "8em", "flex": "0 0 auto"})
        self.upload.add_class("as-upload")
        self.upload.observe(self.uploaded, "value")
        return make(
            widgets.HBox, [self.upload, make(widgets.HTML, remark(UPLOAD_LIMIT))], layout={"margin": "0 0 0 12.2em"}
        )

    def uploaded(self, change: dict[str, Any]) -> None:
        """Keep an uploaded dataset beside the settings file and choose its path."""
        uploaded = uploaded_file(change["new"])
        if uploaded is None:
            return
        path = self.form.store.path.parent / "uploads" / Path(uploaded[0]).name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(uploaded[1])
        empty(self.upload)
        self.form.store.choose("dataset", str(path))
        self.form.store.form.refresh()

    def changed(self, change: dict[str, Any]) -> None:
        """Take what the user typed or clicked; a late message to an older view of the form counts too."""
        form, value = self.form, from_widget(self.info, change["new"])
        if form.updating or value == form.store.shown(self.name):
            return
        form.store.choose(self.name, value)
        form.store.form.refresh()

    def refresh(self) -> None:
        """Show the store's value and what is wrong with it."""
        from traitlets import TraitError

        store, shown = self.form.store, to_widget(self.info, self.form.store.shown(self.name))
        if from_widget(self.info, self.widget.value) != store.shown(self.name):
            with contextlib.suppress(TraitError):  # a value of another kind, which the message tells
                self.widget.value = shown
        if self.words:
            self.word.value = suggested(self.words, self.widget.value)
        problem = store.problems.get(self.name)
        self.message.value = line(RED, problem, "0 0 4px 13em") if problem else ""
