"""The chat in a notebook: a question, two answers side by side, before and after the training; core ipywidgets only, the same on 7.7 (Colab) and on 8.

Front ends save what widgets hold, so no widget holds what is said for longer than a message takes: what is typed is handed over when it is asked
and blanked at once, and what is to be seen passes through a widget that is emptied again, whose script (`templates/show.js`) puts it on the screen.
"""

from __future__ import annotations

import html
import shlex
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from ..errors import AutoSlothError
from ..form import Maker
from ..notebook import front_end_attached
from ..output import counted, render_html, say
from ..run import Run
from .before import Kept, at_hand, before
from .conversation import Conversation
from .speaker import Sampling, Speaker, chat_file

FRAME = 0.1  # seconds between two states of an answer, at the least
TEMPLATES = Path(__file__).parent / "templates"

_shown: list[Panel] = []  # by this process; at most one, since each has models in memory


def open_chat(run: Run) -> None:
    """Show the chat with a run's first GGUF; where nobody watches, or there is none to talk to, a line says so and Run all goes on."""
    command = f"autosloth chat {shlex.quote(str(run.folder))}"
    if not front_end_attached():
        return say(f"chat: nobody is here to talk; `{command}` does it in a terminal")
    from IPython.display import display

    try:
        panel = Panel(run, chat_file(run), command)
    except AutoSlothError as error:
        return say(f"chat: {error.what}\n  {error.todo}")
    while _shown:
        _shown.pop().close()
    _shown.append(panel)
    display(panel.root)


class Panel:
    """The widgets of one chat, and what was said. Models are loaded when the first question is asked; answers are made in a thread, so that no cell waits."""

    def __init__(self, run: Run, file: Path, command: str):
        self.run, self.file, self.name, self.shown = run, file, f"as-{uuid.uuid4().hex}", 0
        self.after: Conversation | None = None
        self.before: Conversation | Kept | None = None
        self.turns: list[dict[str, Any]] = []
        self.system, self.problem = "", ""
        self.stopped, self.working = threading.Event(), threading.Lock()
        self.root = self.build(command)

    def close(self) -> None:
        """Take it off the page, and its models out of memory; an answer in hand is stopped."""
        self.stopped.set()
        with self.working:
            for talk in (self.after, self.before):
                if isinstance(talk, Conversation):
                    talk.speaker.close()
            self.after = self.before = None
            self.root.close()

    def build(self, command: str) -> Any:
        """All widgets in one box: the screen, what is asked, and what else can be chosen."""
        import ipywidgets as widgets

        make = Maker()
        script = (TEMPLATES / "begin.js").read_text(encoding="utf-8")
        screen = render_html("chat/templates/screen.html.j2", name=self.name, command=command, script=script)
        self.wire, self.show_button = (
            make(widgets.HTML, layout={"display": "none"}),
            self.button(make, "Show", self.show),
        )
        self.question = self.held(make, "Question", "ask something, then Enter")
        self.system_field = self.held(make, "System prompt", "none")
        self.ask_button = self.button(make, "Ask", self.ask, button_style="primary")
        self.stop_button = self.button(make, "Stop", lambda *_: self.stopped.set(), disabled=True)
        self.forget_button = self.button(make, "Forget", self.forget)
        self.both = make(widgets.Checkbox, value=at_hand(self.run, self.file), indent=False, description="Ask the model before the training too; its file is made once, of the 16-bit base", layout={"width": "auto"})  # fmt: skip
        self.show_button.layout = {"display": "none"}
        rows = [[self.question, self.ask_button, self.stop_button], [self.system_field, self.forget_button]]
        boxes = [make(widgets.HBox, row, layout={"flex_flow": "row wrap"}) for row in rows]
        parts = [make(widgets.HTML, screen), self.wire, *boxes, self.both, self.show_button]
        root = make(widgets.VBox, parts, layout={"max_width": "64em"})
        root.add_class("as-chat")
        return root

    def held(self, make: Maker, title: str, hint: str) -> Any:
        """A field of which nothing leaves the page before it is asked."""
        import ipywidgets as widgets

        field = make(
            widgets.Text, description=title, placeholder=hint, continuous_update=False,
            style={"description_width": "8em"}, layout={"flex": "1 1 24em", "width": "auto"},
        )  # fmt: skip
        field.add_class("as-held")
        return field

    def button(self, make: Maker, title: str, does: Any, **traits: Any) -> Any:
        """A button that can be found by its name."""
        import ipywidgets as widgets

        button = make(widgets.Button, description=title, layout={"width": "6em"}, **traits)
        button.add_class(f"as-{title.lower()}")
        button.on_click(does)
        return button

    def take(self, field: Any) -> str:
        """What was typed, out of a field that is blank again."""
        text = field.value.strip()
        field.value = ""
        return text

    def ask(self, *_: Any) -> None:
        """Begin to answer what was typed, unless an answer is in hand."""
        question, system = self.take(self.question), self.take(self.system_field)
        if not question or not self.working.acquire(blocking=False):
            return
        if system:
            self.system = system
            self.system_field.placeholder = f"in use, {counted(len(system), 'character')}"
        self.ask_button.disabled, self.stop_button.disabled = True, False
        self.stopped.clear()
        self.problem = ""
        threading.Thread(target=self.answer, args=(question,), daemon=True).start()

    def answer(self, question: str) -> None:
        """Answer, in a thread of its own; whatever goes wrong is told on the screen, and the next question can be asked."""
        try:
            self.turns.append({"question": question, "sides": []})
            for side in ("before", "after") if self.both.value else ("after",):
                self.speak(side, question)
        except AutoSlothError as error:
            self.problem = f"{error.what}\n{error.todo}"
        except Exception as error:  # of llama.cpp or of the libraries: the thread has nobody else to tell it to
            self.problem = f"An unexpected {type(error).__name__}: {error}"
        finally:
            for told in self.turns[-1]["sides"]:
                told["going"] = False
            self.show()
            self.ask_button.disabled, self.stop_button.disabled = False, True
            self.working.release()

    def speak(self, name: str, question: str) -> None:
        """One side's answer, on the screen while it comes."""
        told = {"name": name, "text": "", "notes": [], "going": True}
        self.turns[-1]["sides"].append(told)
        self.show()
        talk, drawn = self.talk(name), 0.0

        def tell(text: str) -> None:
            nonlocal drawn
            told["text"] += text
            if time.monotonic() - drawn > FRAME:
                self.show()
                drawn = time.monotonic()

        if not self.stopped.is_set():
            talk.ask(question, tell, told["notes"].append, self.stopped.is_set)
        told["going"] = False

    def talk(self, name: str) -> Conversation | Kept:
        """The conversation of a side, begun when it is needed."""
        if name == "after" and self.after is None:
            self.after = Conversation(Speaker.of(self.run, self.file), Sampling())
        if name == "before" and self.before is None:
            self.before = before(self.run, self.file, Sampling())
        talk = self.after if name == "after" else self.before
        talk.system = self.system
        return talk

    def forget(self, *_: Any) -> None:
        """Forget what was said, and the system prompt."""
        if not self.working.acquire(blocking=False):
            return
        self.turns.clear()
        self.system, self.problem, self.system_field.placeholder = "", "", "none"
        for talk in (self.after, self.before):
            if isinstance(talk, Conversation):
                talk.forget()
        self.show()
        self.working.release()

    def show(self, *_: Any) -> None:
        """Put the conversation on the screen, through a widget that is empty before and after."""
        self.shown += 1
        said = render_html("chat/templates/turns.html.j2", turns=self.turns, problem=self.problem)
        script = (TEMPLATES / "show.js").read_text(encoding="utf-8")
        data = {"data-screen": self.name, "data-number": str(self.shown), "data-html": said, "onerror": script}
        given = " ".join(f'{name}="{html.escape(value)}"' for name, value in data.items())
        self.wire.value = f'<img hidden src="data:," {given}>'
        self.wire.value = ""
