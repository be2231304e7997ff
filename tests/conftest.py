"""What several tests share: the embedded base, made once, and one finished run."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

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


@pytest.fixture(scope="session")
def base(tmp_path_factory, worker_id):
    """The folder of the embedded tiny base; built in about a minute when it is not in the cache."""
    from autosloth.demo import demo_base

    made_once(tmp_path_factory, worker_id, "base", lambda folder: demo_base())
    return demo_base()


@pytest.fixture(scope="session")
def engine():
    """Unsloth, imported before whatever else a test imports."""
    from autosloth.model import start_engine

    return start_engine()


@pytest.fixture
def cli():
    """Run the command line in a process of its own: cli("sft", "--set", "model=demo", cwd=folder) -> CompletedProcess."""
    return command_line


def command_line(*arguments, cwd=None, timeout=300, **environment):
    command = [sys.executable, "-m", "autosloth", *map(str, arguments)]
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("AUTOSLOTH_") or name == "AUTOSLOTH_CACHE"
    }
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=timeout, env=clean | environment)


def sets(**values):
    """The `--set` arguments for these settings."""
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]


def whole_road(road, storage, **settings):
    """One finished run of a road on the embedded default."""
    result = command_line(road, *sets(**DEMO, storage=storage, **settings))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="session")
def finished(tmp_path_factory, worker_id, base):
    """The whole road on the embedded default. Not to be changed: use `copied` for that."""
    return made_once(tmp_path_factory, worker_id, "runs", partial(whole_road, "sft")) / "short"


@pytest.fixture(scope="session")
def preferred(tmp_path_factory, worker_id, base):
    """The whole road of DPO on the embedded default. Not to be changed."""
    return made_once(tmp_path_factory, worker_id, "preferred", partial(whole_road, "dpo")) / "short"


@pytest.fixture(scope="session")
def played(tmp_path_factory, worker_id, base):
    """The whole road of self-play on the embedded default. Not to be changed."""
    return made_once(tmp_path_factory, worker_id, "played", partial(whole_road, "spin", sft_arm=True)) / "short"


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, to be spoiled."""
    return Path(shutil.copytree(finished, tmp_path / "short", copy_function=shutil.copyfile))


@pytest.fixture(scope="session")
def real_data():
    """A function from a name to the path of a real data file; skips the test where the files are not at hand."""
    folder = Path(__file__).parents[2] / "shared" / "data"

    def find(name):
        if not (folder / name).is_file():
            pytest.skip(f"the real data file {name} is not here")
        return folder / name

    return find
