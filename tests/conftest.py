"""What several tests share: the embedded base, made once, and one finished run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = {"model": "demo", "dataset": "demo", "run_name": "short"}
SHORT = {**DEMO, "max_steps": 40, "save_steps": 20, "eval_answers": 8, "max_new_tokens": 16}


@pytest.fixture(scope="session")
def base():
    """The folder of the embedded tiny base; built in about a minute when it is not in the cache."""
    from autosloth.demo import demo_base

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


@pytest.fixture(scope="session")
def finished(tmp_path_factory, base):
    """The whole road on the embedded default. Not to be changed: use `copied` for that."""
    storage = tmp_path_factory.mktemp("runs")
    result = command_line("sft", *sets(**DEMO, storage=storage))
    assert result.returncode == 0, result.stdout + result.stderr
    return storage / "short"


@pytest.fixture(scope="session")
def preferred(tmp_path_factory, base):
    """The whole road of DPO on the embedded default. Not to be changed."""
    storage = tmp_path_factory.mktemp("preferred")
    result = command_line("dpo", *sets(**DEMO, storage=storage))
    assert result.returncode == 0, result.stdout + result.stderr
    return storage / "short"


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
