"""The package as a house: imports go down only, importing is light, the examples in docstrings hold."""

import doctest
import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "autosloth"
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if not path.name.startswith("__")
)
ORDER = "errors distributed hardware values settings output retries hub_client hub_copy run commands child_process demo notebook weights models data form export proof chat score training publish check roads cli".split()
WINGS = [folder.parent.name for folder in PACKAGE.glob("*/__init__.py")]
HEAVY = ("torch", "transformers", "datasets", "unsloth", "trl", "peft", "numpy", "matplotlib", "llama_cpp", "jinja2")


def script(name):
    """A script of docs/ as a module."""
    specification = importlib.util.spec_from_file_location(name, PACKAGE.parent / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


wings, data_page = script("wings"), script("data")


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_in_the_docstrings_hold(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0


def test_some_docstrings_have_examples():
    assert (
        sum(">>> " in Path(PACKAGE.parent, *module.split(".")).with_suffix(".py").read_text() for module in MODULES) > 9
    )


def test_heavy_libraries_are_imported_where_they_are_used():
    code = f"import sys, {', '.join(MODULES)}; print([name for name in {HEAVY} if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert said.stdout == "[]\n", said.stderr


def test_no_room_imports_from_one_above_it():
    """`ORDER` is the house from its floor to its roof; docs/architecture.md shows it."""
    assert set(wings.imports()) == set(ORDER)
    for room, others in wings.imports().items():
        assert all(ORDER.index(other) < ORDER.index(room) for other in others), (room, others)


def test_a_wing_is_entered_by_its_door():
    """From elsewhere in the package a wing's names are imported from its `__init__`, which lists them."""
    for path in PACKAGE.rglob("*.py"):
        for room, *inner in wings.imported_from(path):
            assert not inner or room == wings.room_of(path), (path, room, inner)


def test_a_door_hands_on_only_what_is_asked_for():
    """By other rooms, or by a notebook."""
    rooms = list(PACKAGE.rglob("*.py"))
    notebooks = " ".join(path.read_text() for path in (PACKAGE.parent / "notebooks").glob("*.ipynb"))
    for wing in WINGS:
        outside = notebooks + " ".join(path.read_text() for path in rooms if wings.room_of(path) != wing)
        names = importlib.import_module(f"autosloth.{wing}").__all__
        assert [name for name in names if not re.search(rf"\b{name}\b", outside)] == [], wing


def test_the_picture_of_the_house_is_that_of_its_imports(tmp_path):
    wings.draw(tmp_path / "wings.svg")
    drawn = (PACKAGE.parent / "docs" / "wings.svg").read_text()
    assert (tmp_path / "wings.svg").read_text() == drawn, "run `python docs/wings.py`"


def test_the_page_of_known_datasets_is_that_of_its_table():
    assert data_page.page() == (PACKAGE.parent / "docs" / "data.md").read_text(), "run `python docs/data.py`"


def test_every_file_of_the_package_is_in_its_wheel(tmp_path):
    for name in ("autosloth", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        path = PACKAGE.parent / name
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, tmp_path / name)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        tmp_path,
    ]
    subprocess.run(pip, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        packed = {name for name in wheel.namelist() if name.startswith("autosloth/")}
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert packed == {path.relative_to(PACKAGE.parent).as_posix() for path in files}
