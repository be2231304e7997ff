"""Colab's and Kaggle's images, rebuilt as far as AutoSloth meets them: `python tests/replica/build.py [IMAGE ...]`, or `make replica`.

Of an image those packages are installed that AutoSloth, its stack and its notebooks import, in the image's versions (IMAGE.json, which newer.py
writes). Its Python and its torch are gigabytes: they are taken where they are asked for, as this script does; else this Python and the torch of
requirements-bare.txt stand in for them, and everything else is the image's.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

sys.path += map(str, Path(__file__).resolve().parents[1:3])  # run as a script, only its own folder is there

from filelock import FileLock
from packaging.utils import canonicalize_name
from support.pins import BARE, NEEDED, laid_over, linux, pinned, stated

from autosloth.run import cache_dir

HERE = Path(__file__).parent
IMAGES = ("colab-2026-08-19", "kaggle-2026-08-12")
JUPYTER = ("ipykernel", "ipython", "ipywidgets", "nbclient", "nbformat", "jupyter-client", "traitlets", "comm")
OF_THE_BUILD = ("torch", "triton", "torchvision")


def replica(image, whole=False):
    """The Python of an environment with what the image has before AutoSloth comes; made once and kept, not to be installed into."""
    listed = json.loads((HERE / f"{image}.json").read_text())
    python = found_python(listed["python"]) if whole else sys.executable
    kind = hashlib.sha256(f"{listed}{sys.version}{whole}{Path(__file__).read_text()}".encode()).hexdigest()[:12]
    folder = cache_dir() / "replicas" / f"{image}-{kind}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([python, "-m", "venv", folder], check=True)
            fill(folder, listed, whole)
            (folder / "complete").touch()
    return folder / "bin" / "python"


def fill(folder, listed, whole):
    """Install the image's packages: Jupyter's with all that they need, the others exactly."""
    versions = {name: package["version"] for name, package in listed["packages"].items()}
    packages = {name: (package["version"], package["requires"]) for name, package in listed["packages"].items()}
    over = stated(laid_over(packages), linux(listed["python"]), ["autosloth"])
    reached = {canonicalize_name(needed.name) for _, needed in over} | set(map(canonicalize_name, NEEDED))
    exact = [f"{name}=={versions[name]}" for name in sorted(reached & set(versions)) if name not in OF_THE_BUILD]
    held = folder / "held.txt"
    held.write_text("".join(f"{name}=={version}\n" for name, version in versions.items() if "+" not in version))
    pip(folder, "-c", held, *(f"{name}=={versions[name]}" for name in JUPYTER if name in versions))
    pip(folder, "--no-deps", *exact)
    if whole:
        pip(folder, *(f"{name}=={versions[name].partition('+')[0]}" for name in OF_THE_BUILD))
    else:
        needs = ("torch", "filelock", "mpmath", "networkx", "setuptools", "sympy")
        pip(
            folder,
            "--no-deps",
            *(f"{name}=={pinned(BARE)[name][0]}" for name in needs if name not in versions or name == "torch"),
        )


def pip(folder, *wanted):
    command = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
    subprocess.run(command, check=True)


def found_python(version):
    """A Python of this version on this machine. Ends with a sentence where there is none."""
    kept = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for python in [shutil.which(f"python{version}"), *kept]:
        if python and not subprocess.run([python, "-c", ""], capture_output=True).returncode:
            return str(python)
    sys.exit(
        f"There is no Python {version} on this machine, which the image has. Install one, with pyenv for instance."
    )


if __name__ == "__main__":
    for name in sys.argv[1:] or IMAGES:
        print(f"{name}: {replica(name, whole=True)}")
