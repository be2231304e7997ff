"""Kills: a piece of work that is ended before its n-th change of a file, and what a run folder then holds."""

import contextlib
import itertools
import json
import os
import re
import signal
import sys

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
OF_THE_TIME = {"finished", "seconds", "fingerprint", "result", "inputs"}  # in a mark: when, and what follows from when


def killed_at(change, work):
    """Do work() in a forked process that SIGKILL ends before its change of this number (from 0); whether it came that far.

    A file that is opened to be written is there, and empty, when the kill comes.
    """
    pid = os.fork()
    if not pid:
        numbers = itertools.count()

        def end(event, told):
            opens = event == "open" and (told[2] or 0) & WRITES
            if (opens or event in CHANGES) and next(numbers) == change:
                if opens and isinstance(told[0], str | bytes | os.PathLike):
                    with contextlib.suppress(OSError):
                        os.open(told[0], told[2], 0o600)
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = lambda _: None  # a kill takes away nothing that was written
        sys.addaudithook(end)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), "the work failed by itself"
    return status != 0


def held_by(folder):
    """{path: content} of what a run folder holds, without what tells when it was done."""
    found, befores = {}, sorted(path.name for path in folder.glob("before/*"))
    for path in sorted(folder.rglob("*")):
        name = re.sub(r"(?<=^before/)[^/]+", lambda at: str(befores.index(at[0])), path.relative_to(folder).as_posix())
        if path.is_file() and name != ".lock":
            text = path.read_text()
            if ".done" in path.parts:
                told = json.loads(text)
                text = {key: value for key, value in told.items() if key not in OF_THE_TIME}
            found[name] = text
        elif path.is_dir() and not any(path.iterdir()):
            found[name] = "an empty folder"
    return found
