"""Pythons with other packages than this one has: the widgets and kernels of Colab, Kaggle and JupyterLab, or tiny ones."""

import hashlib
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
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


def borrowing(folder):
    """The Python of a new environment in `folder` that sees all that this one has, and installs into itself."""
    venv.create(folder)
    site = next(folder.glob("lib/python3*/site-packages"))
    (site / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return folder / "bin" / "python"


def wheel(folder, name, version, module):
    """A package of one module, as small as they come, as a wheel in this folder."""
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        about = f"{name}-{version}.dist-info"
        file.writestr(f"{module}.py", f"MADE_OF = {name!r}\n")
        file.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")
