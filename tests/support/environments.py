"""Pythons with other widgets and kernels than this one: Colab's, Kaggle's, JupyterLab's."""

import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from filelock import FileLock

from autosloth.run import cache_dir
from support.patience import HUNG

LISTS = Path(__file__).parents[1] / "notebook" / "front_ends"


def environment(name):
    """The Python of an environment with what tests/notebook/front_ends/<name>.txt lists; made once, in about 30 s."""
    listed = LISTS / f"{name}.txt"
    version = hashlib.sha256(listed.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = cache_dir() / "front-ends" / f"{name}-{version}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            venv.create(folder)
            pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "--disable-pip-version-check"]
            subprocess.run([*pip, "install", "--quiet", "--no-compile", "-r", listed], check=True, timeout=HUNG)
            (folder / "complete").touch()
    return folder / "bin" / "python"
