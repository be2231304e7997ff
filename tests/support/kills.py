"""Kills: a piece of work that is ended before its n-th change of a file, and what a run folder then holds."""

import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from itertools import pairwise
from pathlib import Path

from autosloth.run import HALF_WRITTEN, STAGES
from support.commands import DEMO, sets

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


# --- Whole roads, killed at random instants. A parent that has imported everything forks a life in milliseconds.


def serve():
    """Live the lives that standard input tells of, one line of JSON each; what became of one is a line on standard output."""
    told, sys.stdout = sys.stdout, sys.stderr
    from autosloth.models.engine import start_engine

    start_engine()
    import trl

    import autosloth.cli
    import autosloth.roads

    assert trl.SFTTrainer and trl.DPOTrainer and autosloth.roads.follow and autosloth.cli.main
    for line in sys.stdin:
        print(json.dumps(live(**json.loads(line))), file=told, flush=True)


def live(arguments, log, temporary, processes=1, until=None, whom=None):
    """One life of the command line, in so many processes as a launcher starts; SIGKILL ends it after `until` seconds, if it has not ended.

    whom: the number of the process that is killed by itself, whose launcher then ends the others; None: all, with what they started.
    Returns whether it was killed, and the exit codes.
    """
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    together |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ranks = [together | {"RANK": str(number), "LOCAL_RANK": str(number)} for number in range(processes)]
    begun = time.monotonic()
    born = [fork(arguments, log, {"TMPDIR": temporary} | (rank if processes > 1 else {})) for rank in ranks]
    left, codes, killed = list(born), [], False
    while left:
        for pid in list(left):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                left.remove(pid)
                codes.append(os.waitstatus_to_exitcode(status))
        if until is not None and left and not killed and not any(codes) and time.monotonic() - begun > until:
            killed = True
            if whom is not None and born[whom] in left:
                os.kill(born[whom], signal.SIGKILL)
            else:
                [os.killpg(pid, signal.SIGKILL) for pid in left]
        elif left and any(codes):  # a launcher ends the others
            [os.killpg(pid, signal.SIGTERM) for pid in left]
        time.sleep(0.01)
    return {"killed": killed, "codes": codes}


def free_port():
    with socket.socket() as any_one:
        any_one.bind(("127.0.0.1", 0))
        return str(any_one.getsockname()[1])


def fork(arguments, log, environment):
    """A process, leader of a group, that does what the command line is given; what it says goes to a file."""
    if pid := os.fork():
        with contextlib.suppress(PermissionError):
            os.setpgid(pid, pid)
        return pid
    os.setpgid(0, 0)
    for number, place in ((0, os.devnull), (1, log), (2, log)):
        os.dup2(os.open(place, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644), number)
    os.environ.update(environment)
    tempfile.tempdir, sys.argv = None, ["autosloth", *arguments]
    code = 1
    try:
        sys.modules["autosloth.cli"].main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


class Lives:
    """A parent of lives, in a process of its own: `with Lives() as live: live(arguments=[...], log=..., temporary=..., until=2.5)`."""

    def __enter__(self):
        command = [sys.executable, "-c", "from support.kills import serve; serve()"]
        paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
        given = os.environ | {"PYTHONPATH": paths}
        self.parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=given)
        return self

    def __call__(self, **life):
        self.parent.stdin.write(json.dumps(life, default=str) + "\n")
        self.parent.stdin.flush()
        return json.loads(self.parent.stdout.readline())

    def __exit__(self, *_):
        self.parent.stdin.close()
        self.parent.wait()


def survive(live, folder, road, kills, seed, processes=1):
    """Kill runs of a road so many times, each at a random instant of a life, and start them again: how many kills ended as if they had not been.

    Returns {"tried", "survived", "by_stage": kills by the stage that they fell into, "differences": what a run that was killed
    ended with other than one that was not}. Raises AssertionError where a start after a kill fails.
    """
    draw, temporary = random.Random(seed), folder / "tmp"
    temporary.mkdir(parents=True)
    told = {"temporary": temporary, "processes": processes}
    begun = time.monotonic()
    live_to_the_end(live, folder / "whole", road, told)
    span, wanted = time.monotonic() - begun, compared(folder / "whole")
    found = {"tried": 0, "survived": 0, "by_stage": {}, "differences": []}
    for storage in (folder / str(number) for number in itertools.count()):
        if found["tried"] == kills:
            return found
        fell, instants = [], sorted(draw.uniform(0, span) for _ in range(min(A_RUN, kills - found["tried"])))
        for before, instant in pairwise([0, *instants]):
            fate = {"until": instant - before, "whom": draw.choice([None, *range(processes)])}
            if not live_to_the_end(live, storage, road, told | fate):
                break
            fell.append(stage_at_work(storage / "short"))
        else:
            live_to_the_end(live, storage, road, told)
        now = compared(storage)
        other = sorted(name for name in wanted.keys() | now.keys() if wanted.get(name) != now.get(name))
        found["tried"] += len(fell)
        found["survived"] += 0 if other else len(fell)
        found["differences"] += [f"{storage}: {name}" for name in other]
        for stage in fell:
            found["by_stage"][stage] = found["by_stage"].get(stage, 0) + 1


A_RUN = 5  # kills, at instants spread over the time that an undisturbed one takes
FEW = {**DEMO, "max_steps": 4, "save_steps": 1, "eval_answers": 2, "max_new_tokens": 8, "merged": False}  # fmt: skip
FEW_OF = {
    "sft": {"eval_steps": 1},
    "dpo": {"eval_steps": 1},
    "spin": {"rounds": 2, "prompts_per_round": 16, "stop_early": False},
}


def live_to_the_end(live, storage, road, told):
    """A life of a run of a few steps; whether it was killed. Raises AssertionError where it failed by itself."""
    storage.mkdir(exist_ok=True)
    became = live(arguments=[road, *settings_of_few(road, storage)], log=storage / "log", **told)
    assert became["killed"] or not any(became["codes"]), (storage / "log").read_text()[-4000:]
    return became["killed"]


def settings_of_few(road, storage):
    """The `--set` arguments of a run of a few steps."""
    return sets(**FEW, **FEW_OF[road], storage=storage)


def stage_at_work(run):
    """The first stage of a run that is not done."""
    return next((name for name in STAGES if not (run / ".done" / f"{name}.json").is_file()), "after the last")


def compared(storage):
    """{path: content} of what a run is for, without what tells of times, memory and places."""
    run, found = storage / "short", {}
    for name in ("data", "adapter", "reference", "merged", "gguf", "publish", "publish-GGUF", "rounds"):
        for path in sorted(path for path in (run / name).rglob("*") if path.is_file()):
            found[path.relative_to(run).as_posix()] = without_times(path, storage)
    left = [path for path in run.rglob("*") if path.name.endswith(HALF_WRITTEN)]
    return found | {"facts.json": without_times(run / "facts.json", storage), "half-written": left}


def without_times(path, storage):
    if path.suffix in (".json", ".md"):
        text = path.read_text().replace(str(storage), "")
        lines = [line for line in text.splitlines() if not re.match(r' *"(\w*seconds|tokens_per_second|peak_\w+)":|\| (time|memory|RAM|VRAM|speed|energy) \|', line)]  # fmt: skip
        return "\n".join(lines)
    return hashlib.sha256(path.read_bytes()).hexdigest()
