"""`autosloth chat`: a conversation in the terminal, or with lines that come by a pipe."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from ..errors import AutoSlothError
from ..output import counted, say
from ..run import Run
from ..values import is_home
from .before import Kept, before
from .conversation import Conversation
from .speaker import Sampling, Speaker, chat_file

ENDS = ("/exit", "/quit")
HELP = """\
/reset         forget what was said
/save [FILE]   add the conversation to a JSONL file of `messages`, which `dataset` takes
/exit          end, as Ctrl-D does; Ctrl-C stops the answer in hand"""


def chat(run: Run, sampling: Sampling, base: bool = False, system: str = "") -> None:
    """Talk to a run's first GGUF until the input ends. base: the model before the training answers too. Raises VerifyError, ModelError."""
    file = chat_file(run)
    talks: dict[str, Conversation | Kept] = {"after": Conversation(Speaker.of(run, file), sampling, system)}
    if base:
        say("chat: the model before the training answers too; its file is made, if it is not in the cache")
        talks["before"] = before(run, file, sampling, system)
    say(f"chat: {file.name}; /help tells what can be typed besides questions")
    for line in typed():
        command, _, rest = line.partition(" ")
        try:
            if command in COMMANDS:
                COMMANDS[command](run, talks, rest.strip())
            elif command.startswith("/") and command[1:].isalpha():
                say(f"There is no {command}: {', '.join(sorted([*COMMANDS, *ENDS]))} are there.")
            else:
                answer(talks, line)
        except AutoSlothError as error:
            say(f"{error.what}\n  {error.todo}")


def typed() -> Iterator[str]:
    """What is typed, line by line, without empty ones; Ctrl-C drops a line, Ctrl-D and /exit end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - with it `input` takes lines that can be edited
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            say("")
            continue
        if line.partition(" ")[0] in ENDS:
            return
        line = line.encode("utf-8", errors="surrogateescape").decode(
            "utf-8", errors="replace"
        )  # bytes that are no text
        if line:
            yield line


def answer(talks: dict[str, Conversation | Kept], question: str) -> None:
    """Print each side's answer while it comes, one behind the other, named where there are two; Ctrl-C stops the one in hand."""
    for side, talk in talks.items():
        if len(talks) > 1:
            print(f"{side}: ", end="", flush=True)
        notes: list[str] = []
        with stop_button() as stopped:
            talk.ask(question, lambda text: print(text, end="", flush=True), notes.append, stopped.is_set)
        say("")
        for note in notes:
            say(f"[{note}]")


@contextlib.contextmanager
def stop_button() -> Iterator[threading.Event]:
    """Set by Ctrl-C while it lasts."""
    stopped, held = threading.Event(), signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, held)


def reset(run: Run, talks: dict[str, Conversation | Kept], rest: str) -> None:
    """Forget what was said."""
    for talk in talks.values():
        if isinstance(talk, Conversation):
            talk.forget()
    say("Forgotten.")


def keep(run: Run, talks: dict[str, Conversation | Kept], rest: str) -> None:
    """Save what was said with the trained model."""
    if not talks["after"].turns:
        return say("There is nothing to save yet.")
    path = Path(rest or f"{run.settings.run_name}-chat.jsonl")
    path = path.expanduser() if is_home(str(path)) or not rest.startswith("~") else path
    rows = talks["after"].save(path)
    few = "; a training needs two at least: /reset begins another" if rows < 2 else ""
    say(f"{path}: {counted(rows, 'conversation')}{few}")


COMMANDS = {"/reset": reset, "/save": keep, "/help": lambda *_: say(HELP)}
