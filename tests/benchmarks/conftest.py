"""What the tests of the benchmarks share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def benchmarks():
    """The folder of the benchmarks, from which their modules can be imported."""
    folder = Path(__file__).parents[2] / "benchmarks"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder
