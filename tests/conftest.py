"""What several tests share: the embedded base, made once, and one finished run."""

import inspect
import re
import shutil
from functools import cache, partial
from pathlib import Path

import pytest
from support.commands import command_line, made_once, whole_road

NAMED = re.compile(
    r"assert_named_problem|pytest\.raises\((errors\.)?(AutoSloth|Settings|Storage|Data|Model|Export|Verify|Hub|Install|Demo)Error|Problems\b"
)


def pytest_collection_modifyitems(items):
    """Mark the tests of a bad input: those that expect a named error, by their own words."""
    for item in items:
        if isinstance(item, pytest.Function) and expects_a_named_error(item.function):
            item.add_marker("bad_input")


@cache
def expects_a_named_error(function):
    """Whether a test's source expects one of AutoSloth's errors."""
    return bool(NAMED.search(inspect.getsource(function)))


@pytest.fixture(scope="session")
def base(tmp_path_factory, worker_id):
    """The folder of the embedded tiny base; built in about a minute when it is not in the cache."""
    from autosloth.demo.forest import demo_base

    made_once(tmp_path_factory, worker_id, "base", lambda folder: demo_base())
    return demo_base()


@pytest.fixture(scope="session")
def engine():
    """Unsloth, imported before whatever else a test imports."""
    from autosloth.models.engine import start_engine

    return start_engine()


@pytest.fixture
def cli():
    """Run the command line in a process of its own: cli("sft", "--set", "model=demo", cwd=folder) -> CompletedProcess."""
    return command_line


@pytest.fixture(scope="session")
def finished(tmp_path_factory, worker_id, base):
    """The whole road on the embedded default, by the notebook. Not to be changed: use `copied` for that."""
    return made_once(tmp_path_factory, worker_id, "runs", partial(whole_road, "sft")) / "short"


@pytest.fixture(scope="session")
def preferred(tmp_path_factory, worker_id, base):
    """The whole road of DPO on the embedded default, by the notebook. Not to be changed."""
    return made_once(tmp_path_factory, worker_id, "preferred", partial(whole_road, "dpo")) / "short"


@pytest.fixture(scope="session")
def played(tmp_path_factory, worker_id, base):
    """The whole road of self-play on the embedded default, by the notebook. Not to be changed."""
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
