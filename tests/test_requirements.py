"""requirements.txt and requirements-bare.txt are installed with --no-deps, so only these tests say that nothing is missing."""

import ast
import json
import re
import sys
from collections import Counter
from importlib.metadata import packages_distributions, version

import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version
from support.pins import (
    BARE,
    COMPILED,
    HOME,
    KNOWN_BROKEN,
    KNOWN_EXCEPTIONS,
    NEEDED,
    ON_COLAB,
    ON_EVERY_IMAGE,
    broken,
    lacking,
    lines,
    linux,
    pinned,
    refusing,
    unmet,
)


@pytest.mark.parametrize("file", [ON_COLAB, BARE])
def test_every_line_is_an_exact_pin(file):
    assert [str(line) for line in lines(file) if not re.fullmatch(r"==[^*,]+", str(line.specifier))] == []


def test_no_package_is_pinned_twice():
    count = Counter(canonicalize_name(line.name) for line in lines(ON_COLAB, BARE))
    assert [name for name, times in count.items() if times > 1] == []


def test_colab_keeps_what_its_notebooks_run_on():
    stack = {"torch", "torchvision", "triton", "numpy", "pandas", "fsspec"}
    jupyter = {"ipykernel", "ipython", "ipywidgets", "jupyter-client", "jupyter-core", "nbclient", "traitlets"}
    assert set(pinned(ON_COLAB)) & (stack | jupyter) == set()


def test_what_is_installed_is_what_is_pinned():
    pins = {name: pin for name, (pin, _) in pinned(ON_COLAB, BARE).items()}
    installed = {name: Version(version(name)).public for name in pins}  # public: without the `+cpu` of torch's build
    assert installed == pins


# --- Completeness. An exception that is no longer one fails too, so the lists in support/pins.py stay true.


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_both_files_together_are_complete(python):
    packages = pinned(ON_COLAB, BARE) | {"autosloth": ("0", NEEDED)}
    assert unmet(packages, linux(python)) == set(KNOWN_EXCEPTIONS)


# What each image has that a pin breaks. Each is one day's, and only the part of it that AutoSloth meets; its file says of
# which list.
IMAGES = {
    "colab-2026-08-19": set(),
    "colab-2025-10": set(KNOWN_BROKEN),
    "colab-2025-07": set(KNOWN_BROKEN),
    "kaggle-2026-08-12": set(),
}


def read_image(name):
    """(packages, Python) of an image."""
    image = json.loads((HOME / f"tests/replica/{name}.json").read_text())
    return {name: (one["version"], one["requires"]) for name, one in image["packages"].items()}, image["python"]


@pytest.mark.parametrize("name", IMAGES)
def test_laid_over_an_image_nothing_is_missing_or_refused(name):
    # What the pins require is read from the ones installed here, also when that is under another Python than the
    # image's: their wheels state the same for all.
    packages, python = read_image(name)
    assert pinned(BARE).keys() >= COMPILED
    assert lacking(packages, linux(python)) == {pair for pair in KNOWN_EXCEPTIONS if pair[1] not in ON_EVERY_IMAGE}
    assert refusing(python) == {}


@pytest.mark.parametrize("name", IMAGES)
def test_laid_over_an_image_only_known_neighbours_break(name):
    packages, python = read_image(name)
    assert broken(packages, linux(python)) == IMAGES[name]


def test_autosloth_imports_only_what_it_needs():
    trees = [ast.parse(path.read_text()) for path in (HOME / "autosloth").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    modules = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"autosloth"}
    modules -= {"google"}  # google.colab, which only Colab has
    modules -= {"conversion", "gguf"}  # llama.cpp's converter, out of llama-cpp-python's source package
    modules -= {"pynvml"}  # which counts the GPU's energy where an image has it, as Colab's does
    modules -= {"lm_eval"}  # for `autosloth score --tasks`, where it is installed
    modules -= {"vllm"}  # which answers in self-play where it is there and asked for
    modules -= {"nbclient", "nbformat"}  # notebook/headless.py, which runs notebooks where no front end does
    owners = packages_distributions()
    assert [name for name in modules if not set(map(canonicalize_name, owners.get(name, []))) & set(NEEDED)] == []
