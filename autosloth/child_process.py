"""Processes that end with this one: a module's `main`, whose memory and imports end with it (request and answer are JSON), and any program in the background."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .errors import AutoSlothError
from .output import last_words, say

SERVE = "from autosloth.child_process import serve; serve()"
# What is started stands in a process group of its own, which ends when nobody holds the other end of standard input any more.
GUARD = """
import os, signal, subprocess, sys, threading

def end_with_parent():
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)

threading.Thread(target=end_with_parent, daemon=True).start()
sys.exit(subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL).returncode)
"""
REPORTS = ("base: ", "demo base: ")  # how lines begin that are passed on at once
NOT_NEEDED = ("bitsandbytes", "torchao")  # quantizers that peft and transformers load where they find them, in 2 s of 9


@dataclass
class Ended:
    """How a process ended: its exit status, its answer (empty if it gave none), what it wrote to standard error."""

    status: int
    answer: dict[str, Any]
    errors: str

    @property
    def reason(self) -> str:
        """Why it ended without an answer: its last words, and the signal that ended it, if one did."""
        said = last_words(self.errors)
        return said if self.status >= 0 else f"its process was ended by signal {-self.status}: {said}"


def run_apart(
    module: str,
    request: dict[str, Any],
    online: bool,
    bare: bool = True,
    started: Callable[[subprocess.Popen], None] = lambda process: None,
    **environment: str,
) -> Ended:
    """Run `module.main(request)` in another Python; its answer is the last line of that one's output.

    online: it may read the Hub, by the same token as this process; bare: it loads no training stack; started: is given the process, which it may kill;
    environment: for it alone, where nothing else is set.
    """
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment = {**environment, **os.environ, "PYTHONPATH": paths}
    environment |= hub_access() if online else {"HF_HUB_OFFLINE": "1"}
    words = [module, json.dumps(request, default=str), *(["bare"] if bare else [])]
    command, last = [sys.executable, "-c", SERVE, *words], ""
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        with subprocess.Popen(command, **pipes, text=True, env=environment) as process:
            started(process)
            try:
                for line in process.stdout:
                    last = line
                    if line.startswith(REPORTS):
                        say(line.rstrip())
            except BaseException:  # the user's interruption
                process.kill()
                raise
        errors.seek(0)
        return Ended(process.returncode, json.loads(last) if last.endswith("}\n") else {}, errors.read())


def serve() -> None:
    """The other end of `run_apart`: print what the module's `main` finds, or an AutoSlothError as `error`, and end with exit code 1."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    module, request, *bare = sys.argv[1:]
    if bare:
        sys.modules |= dict.fromkeys(NOT_NEEDED)  # not to be found, as far as imports can see
    try:
        print(json.dumps(importlib.import_module(module).main(json.loads(request))))
    except AutoSlothError as error:
        print(json.dumps({"error": [error.what, error.todo]}))
        sys.exit(1)


def end_with_parent() -> None:
    """End this process when the one that started it is gone, killed perhaps: it holds the other end of standard input, and writes nothing."""
    os.read(0, 1)
    os._exit(1)


def start_behind(command: list[str], environment: dict[str, str], log: IO[str]) -> subprocess.Popen:
    """Start a program in the background; it ends, with all that it has started, when this process does, killed perhaps. log: takes what it says."""
    guarded = [sys.executable, "-c", GUARD, *command]
    pipes = {"stdin": subprocess.PIPE, "stdout": log, "stderr": subprocess.STDOUT}
    return subprocess.Popen(guarded, **pipes, env=environment, start_new_session=True)


def hub_access() -> dict[str, str]:
    """The environment of a process that reads the Hub: the token goes there and nowhere else, and chunks are not kept beside the files."""
    from huggingface_hub import get_token

    token = get_token()
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_XET_CHUNK_CACHE_SIZE_BYTES": "0"}
    return quiet | ({"HF_TOKEN": token} if token else {})
