"""The command line in a process of its own, and what is made once for several tests."""

import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

from support.patience import HUNG

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NOTEBOOK_OF = {"sft": "AutoSloth-SFT.ipynb", "dpo": "AutoSloth-DPO.ipynb", "spin": "SPIN-iter.ipynb"}
DEMO = {"model": "demo", "dataset": "demo", "run_name": "short"}
SHORT = {**DEMO, "max_steps": 40, "save_steps": 20, "eval_answers": 8, "max_new_tokens": 16}


def made_once(tmp_path_factory, worker_id, name, make):
    """The folder that make(folder) fills, once for all the processes that share the work (pytest-xdist)."""
    from filelock import FileLock  # which not every front end's environment has

    root = tmp_path_factory.getbasetemp()
    folder = (root if worker_id == "master" else root.parent) / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


def command_line(*arguments, cwd=None, new_group=False, **environment):
    command = [sys.executable, "-m", "autosloth", *map(str, arguments)]
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("AUTOSLOTH_") or name == "AUTOSLOTH_CACHE"
    }
    clean |= environment
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, timeout=HUNG, env=clean, start_new_session=new_group
    )


def called_here(arguments, environment):
    """The console script in the process that this is called in, with these variables: what a process that has its imports done takes a moment for."""
    from autosloth.cli import main

    written, errors, given = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["autosloth", *map(str, arguments)]
    with mock.patch.dict(os.environ, environment), redirect_stdout(written), redirect_stderr(errors):
        try:
            main()
        except SystemExit as end:
            return subprocess.CompletedProcess(arguments, end.code or 0, written.getvalue(), errors.getvalue())
        finally:
            sys.argv = given
    return subprocess.CompletedProcess(arguments, 0, written.getvalue(), errors.getvalue())


@contextmanager
def quick_process(environment):
    """A pool of one process that has this environment from its start, before any import, and in which nobody sleeps between tries."""
    from support.faults import be_quick

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, environment, clear=True):
            pool.submit(be_quick).result()
        yield pool


DEADLY = """
import os, signal, sys

def end(event, _):
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.scandir", "os.truncate") and os.path.isfile({path!r}):
        os.killpg(0, signal.SIGKILL)

sys.addaudithook(end)
"""


def killed_after(path, *arguments, **environment):
    """The command line, which kills itself and what it started as soon as it touches a file while this one is there."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text(DEADLY.format(path=str(path)))
        paths = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        ended = command_line(*arguments, new_group=True, PYTHONPATH=paths, **environment)
    assert ended.returncode == -signal.SIGKILL and path.is_file(), ended.stdout + ended.stderr


def sets(**values):
    """The `--set` arguments for these settings."""
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]


def whole_road(road, storage, **settings):
    """One finished run of a road on the embedded default: its notebook, executed by nbmake."""
    values = {
        f"AUTOSLOTH_{name.upper()}": str(value) for name, value in {**DEMO, "storage": storage, **settings}.items()
    }
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AUTOSLOTH_", "PYTEST_")) or name == "AUTOSLOTH_CACHE"
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--nbmake", f"--nbmake-timeout={HUNG}"]
    result = subprocess.run(
        [*command, NOTEBOOKS / NOTEBOOK_OF[road]], capture_output=True, text=True, timeout=2 * HUNG, env=clean | values
    )
    assert result.returncode == 0 and "1 passed" in result.stdout, result.stdout + result.stderr
