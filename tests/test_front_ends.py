"""The form on the widgets and kernels of Colab and Kaggle, each in an environment of its own, and in real front ends in a real browser."""

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from filelock import FileLock

from autosloth.run import cache_dir

HERE = Path(__file__).parent


def environment(name):
    """The Python of an environment with what tests/front_ends/<name>.txt lists; made once, in about 30 s."""
    listed = HERE / "front_ends" / f"{name}.txt"
    version = hashlib.sha256(listed.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = cache_dir() / "front-ends" / f"{name}-{version}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            venv.create(folder, with_pip=True)
            pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, "-r", listed], check=True, timeout=600)
            (folder / "complete").touch()
    return folder / "bin" / "python"


def pytest_there(name, *files, **variables):
    """Run test files in that environment; the test fails with what they print."""
    command = [environment(name), "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    variables |= {"PYTHONPATH": str(HERE.parent)}
    result = subprocess.run(
        command, cwd=HERE.parent, env={**os.environ, **variables}, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("name", ["colab", "kaggle"])
def test_the_form_is_the_same_on_the_widgets_of(name):
    assert " passed" in pytest_there(name, "tests/test_store.py", "tests/test_form.py")


def test_in_the_browser_as_a_person_would(base):
    """JupyterLab, and the classic Notebook with Colab's widgets, in Chromium; screenshots go to $AUTOSLOTH_SCREENSHOTS."""
    if not shutil.which("chromium"):
        pytest.skip("there is no chromium here")
    pythons = {"CLASSIC": str(environment("colab")), "KERNEL": sys.executable}
    said = pytest_there("lab", "tests/front_ends/browser.py", **pythons, BASE=str(base))
    assert " passed" in said and "skipped" not in said
