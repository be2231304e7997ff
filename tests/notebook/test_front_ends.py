"""The form on the widgets and kernels of Colab and Kaggle, each in an environment of its own, and in real front ends in a real browser."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support.environments import environment
from support.patience import HUNG

ROOT = Path(__file__).parents[2]


def pytest_there(name, *files, **variables):
    """Run test files in that environment; the test fails with what they print."""
    command = [environment(name), "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    variables |= {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=2 * HUNG
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["colab", "kaggle"])
def test_the_form_is_the_same_on_the_widgets_of(name):
    assert " passed" in pytest_there(name, "tests/form/test_store.py", "tests/form/test_form.py")


@pytest.mark.slow
def test_in_the_browser_as_a_person_would(base, finished):
    """JupyterLab, and the classic Notebook with Colab's widgets, in Chromium; screenshots go to $SCREENSHOTS."""
    if not shutil.which("chromium"):
        pytest.skip("there is no chromium here")
    pythons = {"CLASSIC": str(environment("colab")), "KERNEL": sys.executable}
    places = {"BASE": str(base), "RUN": str(finished), "LIBRARIES": sysconfig.get_path("purelib")}
    said = pytest_there("lab", "tests/notebook/front_ends/browser.py", **pythons, **places)
    assert " passed" in said and "skipped" not in said
