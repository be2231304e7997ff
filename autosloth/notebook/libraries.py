"""The libraries of the machine that a notebook runs on, brought to the versions that AutoSloth was tested with."""

from __future__ import annotations

import importlib
import platform
import subprocess
import sys
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from ..errors import InstallError
from ..hardware import gpu_name
from ..output import counted, last_words, say
from .runtime import place

SHOWN = "autosloth unsloth trl transformers peft datasets bitsandbytes torch llama-cpp-python".split()
RESTART = {"colab": "Choose Runtime > Restart session", "kaggle": "Choose Run > Restart & clear cell outputs"}
PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]


def install() -> None:
    """Install what requirements.txt pins and this machine has not, or has in another version; then say what runs here.

    What a library of the image is replaced by is said. Raises InstallError where pip fails, and where one that is replaced was imported
    before: this session would go on with halves of both.
    """
    had = {name: Version(version).public for name, version in versions().items()}
    lacking = {name: version for name, version in pins().items() if had.get(name) != version}
    if lacking:
        replaced = [name for name in lacking if name in had]
        loaded = sorted(set(replaced) & loaded_distributions())
        say(f"install: {counted(len(lacking), 'package')}, about a minute")
        run_pip([f"{name}=={version}" for name, version in lacking.items()])
        say_replaced({name: (had[name], lacking[name]) for name in replaced})
        if loaded:
            raise InstallError(
                f"{', '.join(loaded)} had been imported in this session before it was replaced, which ends in errors later.",
                f"{RESTART.get(place(), 'Restart the kernel')} once and press Run all again; nothing has to be installed a second time.",
            )
    show_versions()


def pins() -> dict[str, str]:
    """The version of each library that requirements.txt pins; the package's metadata holds it as the extra `colab`."""
    wanted = map(Requirement, metadata.requires("autosloth") or [])
    return {
        canonicalize_name(line.name): str(line.specifier).removeprefix("==")
        for line in wanted
        if line.marker and line.marker.evaluate({"extra": "colab"})
    }


def versions() -> dict[str, str]:
    """The version of each distribution that is installed here; of two with one name that which is imported."""
    return {canonicalize_name(found.name): found.version for found in [*metadata.distributions()][::-1] if found.name}


def loaded_distributions() -> set[str]:
    """The distributions of which this process has imported something."""
    imported = {name.partition(".")[0] for name in sys.modules}
    owners = metadata.packages_distributions()
    return {canonicalize_name(owner) for name in imported for owner in owners.get(name, [])}


def run_pip(wanted: list[str]) -> None:
    """Install these, and nothing that they ask for. Raises InstallError."""
    pip = subprocess.run([*PIP, *wanted], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    importlib.invalidate_caches()
    if pip.returncode:
        internet = "Switch the internet on (Settings > Internet)" if place() == "kaggle" else "Look at what pip says"
        raise InstallError(
            f"The libraries could not be installed: {last_words(pip.stdout)}.",
            f"{internet}, and run this cell again: what is there already is not installed twice.",
        )


def say_replaced(changes: dict[str, tuple[str, str]]) -> None:
    """Say which libraries of the image are others now, and what of the image no longer runs beside them."""
    if changes:
        say("install: replaced " + ", ".join(f"{name} {old} by {new}" for name, (old, new) in changes.items()))
    if "torchao" in changes and "torchtune" in versions():
        say("install: torchtune does not run beside this torchao (peft takes no older one); AutoSloth does not need it")


def show_versions() -> None:
    """Say what runs here: AutoSloth and the libraries that it trains and exports with, Python, torch, the GPU."""
    found = versions()
    where = {"colab": " on Colab", "kaggle": " on Kaggle", "elsewhere": ""}[place()]
    installed = ", ".join(f"{name} {found[name]}" for name in SHOWN if name in found)
    say(f"{installed}; Python {platform.python_version()}{where}")
    say(
        f"GPU: {gpu_name() or 'none; the form, the checks and the data need none, training a model of more than 1B does'}"
    )
