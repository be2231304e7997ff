"""The install cell's library part: what is missing or has another version is installed, said, and asks for a restart where it was loaded."""

import json
import os
import subprocess

import pytest
from support.environments import borrowing, wheel

from autosloth.notebook import libraries

DRIVER = """
import importlib, json, os, sys
from autosloth.notebook import libraries
from autosloth.errors import InstallError
pins, loaded, times = json.loads(sys.argv[1])
libraries.pins = lambda: pins
for name in loaded:
    importlib.import_module(name)
for _ in range(times):
    try:
        libraries.install()
    except InstallError as error:
        print("STOPPED:", error)
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """install(pins, loaded=(), times=1) on a machine that has sloth-a 1.0 and torchtune, with an index of three tiny packages; its output."""
    folder = tmp_path_factory.mktemp("machine")
    python = borrowing(folder / "venv")
    (folder / "index").mkdir()
    for name, version, module in [("sloth_a", "1.0", "sloth_a"), ("sloth_a", "2.0", "sloth_a"), ("sloth_b", "1.5", "sloth_b")]:  # fmt: skip
        wheel(folder / "index", name, version, module)
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder / "index"), "COLAB_RELEASE_TAG": "x"}

    def install(pins, loaded=(), times=1, begin=("sloth_a==1.0",)):
        subprocess.run([python, "-m", "pip", "uninstall", "-yq", "sloth_a", "sloth_b"], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *begin], env=environment, check=True)
        told = json.dumps([pins, loaded, times])
        done = subprocess.run([python, "-c", DRIVER, told], env=environment, capture_output=True, text=True)
        assert not done.returncode, done.stderr
        return done.stdout

    return install


def test_what_is_missing_or_other_is_installed_and_what_it_replaces_is_said(machine):
    said = machine({"sloth-a": "2.0", "sloth-b": "1.5"}, times=2)
    first, second = said.split("GPU: ", 1)
    assert "install: 2 packages, about a minute\ninstall: replaced sloth-a 1.0 by 2.0\n" in first
    assert "install:" not in second and "STOPPED" not in said  # all is there the second time


def test_what_was_imported_before_it_was_replaced_asks_for_a_restart(machine):
    said = machine({"sloth-a": "2.0", "sloth-b": "1.5"}, loaded=["sloth_a"])
    assert "STOPPED: sloth-a had been imported in this session before it was replaced" in said
    assert "Choose Runtime > Restart session once and press Run all again" in said and "GPU: " not in said


def test_what_was_imported_and_stays_asks_for_nothing(machine):
    said = machine({"sloth-a": "1.0", "sloth-b": "1.5"}, loaded=["sloth_a"])
    assert "install: 1 package, about a minute\n" in said and "STOPPED" not in said and "replaced" not in said


def test_what_cannot_be_installed_says_why_and_what_to_do(machine):
    said = machine({"sloth-a": "3.0"})
    assert (
        "STOPPED: The libraries could not be installed: ERROR: No matching distribution found for sloth-a==3.0." in said
    )
    assert "run this cell again" in said and "Traceback" not in said


def test_the_pins_are_those_of_requirements_txt():
    from support.pins import ON_COLAB, pinned

    assert libraries.pins() == {name: pin for name, (pin, _) in pinned(ON_COLAB).items()}, "run `make setup`"


def test_a_torchao_that_torchtune_does_not_run_beside_is_said(monkeypatch, capsys):
    monkeypatch.setattr(libraries, "versions", lambda: {"torchtune": "0.6.1"})
    libraries.say_replaced({"torchao": ("0.10.0", "0.16.0")})
    assert "torchtune does not run beside this torchao" in capsys.readouterr().out


def test_what_runs_here_is_printed(capsys):
    libraries.show_versions()
    said = capsys.readouterr().out
    assert "autosloth " in said and "torch 2" in said and "Python 3." in said and "GPU: " in said


def test_nothing_that_is_pinned_is_imported_before_it_is_installed():
    code = (
        "import autosloth.notebook, autosloth.export, sys; from autosloth.notebook.libraries import *\n"
        "print(sorted(loaded_distributions() & set(pins())))"
    )
    assert subprocess.check_output([os.sys.executable, "-c", code], text=True) == "[]\n"
