"""What is found out while a form is filled in: in a process of its own, so that nothing typed waits for it, and ended by the next letter."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from typing import Any

from ..child_process import run_apart
from ..hub_client import is_offline
from ..settings import Settings
from ..values import is_hub_id

PAUSE = 0.6  # seconds without a letter before anything is asked

# Answers about what is on the Hub: each Run all makes the form anew. A file may change, and what is a problem may be mended.
_known: dict[tuple[Any, ...], dict[str, Any]] = {}


class Glance:
    """The answer of a module's `main` about the settings, whenever those of them that it depends on have changed.

    tell: is given the answer, None as soon as it is of something else that the settings speak.
    """

    def __init__(self, module: str, names: tuple[str, ...], tell: Callable[[dict[str, Any] | None], None]):
        self.module, self.names, self.tell = module, names, tell
        self.lock, self.key = threading.Lock(), ()
        self.timer: threading.Timer | None = None
        self.process: subprocess.Popen | None = None

    def follow(self, settings: Settings) -> None:
        """Ask about these settings, unless that was asked last."""
        key = (self.module, settings.road, *(repr(getattr(settings, name, None)) for name in self.names))
        if key == self.key:
            return
        self.leave(key)
        self.tell(_known.get(key))
        if key not in _known:
            self.timer = threading.Timer(PAUSE, self.ask, (key, settings))
            self.timer.daemon = True
            self.timer.start()

    def leave(self, key: tuple[Any, ...] = ()) -> None:
        """Let what is asked be, and wait for the answer of this key alone."""
        with self.lock:
            self.key = key
            if self.timer:
                self.timer.cancel()
            if self.process:
                self.process.kill()

    def ask(self, key: tuple[Any, ...], settings: Settings) -> None:
        """Get the answer, and tell it where it is still of what stands there."""

        def started(process: subprocess.Popen) -> None:
            with self.lock:
                self.process = process
                if key != self.key:
                    process.kill()

        request = {"road": settings.road, "values": settings.model_dump()}
        ended = run_apart(self.module, request, online=not is_offline(), bare=False, started=started)
        if not ended.status and lasts(settings, ended.answer):
            _known[key] = ended.answer
        with self.lock:  # so that nobody asks about something else meanwhile
            if key == self.key:
                self.process = None
                self.tell({} if ended.status else ended.answer)


def lasts(settings: Settings, answer: dict[str, Any]) -> bool:
    """Whether an answer is one that another time would be given too."""
    told = answer.get("parts", [answer])
    names = [part["path"] for part in settings.parts] if "parts" in answer else [settings.model]
    return all(map(is_hub_id, names)) and all(each and "problem" not in each for each in told)
