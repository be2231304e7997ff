"""requirements.txt and requirements-bare.txt are installed with --no-deps, so only these tests say that nothing is missing."""

import ast
import json
import re
import sys
from collections import Counter
from importlib.metadata import packages_distributions, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

HOME = Path(__file__).parent.parent
ON_COLAB, BARE = "requirements.txt", "requirements-bare.txt"

# The distributions AutoSloth imports, or runs on.
NEEDED = [
    *[
        "unsloth",
        "unsloth-zoo",
        "trl",
        "peft",
        "transformers",
        "accelerate",
        "tokenizers",
        "datasets",
        "bitsandbytes",
        "torchao",
    ],
    *["torch", "numpy", "sentencepiece", "safetensors", "huggingface-hub", "llama-cpp-python", "pydantic", "pyyaml"],
    *["typer", "rich", "jinja2", "psutil", "packaging", "matplotlib", "ipywidgets", "ipython", "httpx", "filelock"],
    *["traitlets", "typing-extensions"],
    *["pyarrow", "fsspec", "aiohttp"],
]


def lines(*files):
    """The requirement lines of these files, without comments."""
    bare = (line.partition("#")[0].strip() for file in files for line in (HOME / file).read_text().splitlines())
    return [Requirement(line) for line in bare if line]


def pinned(*files):
    """{name: (pinned version, what it requires)}, the requirements as the installed distribution states them."""
    return {
        canonicalize_name(line.name): (str(line.specifier).removeprefix("=="), requires(line.name) or [])
        for line in lines(*files)
    }


def unmet(packages, environment):
    """What `pip check` would complain of, extras included: {(package, what it requires)}. `packages` is as `pinned` gives it."""
    complaints, seen, todo = set(), set(), [(name, "") for name in packages]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for needed in map(Requirement, packages[name][1]):
            other = canonicalize_name(needed.name)
            if needed.marker and not needed.marker.evaluate(environment | {"extra": extra}):
                continue
            if other not in packages or not needed.specifier.contains(packages[other][0], prereleases=True):
                complaints.add((name, other))
            else:
                todo += [(other, wanted) for wanted in needed.extras]
    return complaints


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


# --- Completeness. An exception that is no longer one fails too, so these lists stay true.

CERTIFI = "Unsloth wants the certificates of its own month, which an index may not have yet; older ones do as well."
XFORMERS = "A faster attention for GPUs, hundreds of MB bound to one torch; torch's own attention stands in for it."
TRITON = "Compiles GPU kernels: a GPU build of torch brings the one that fits, a CPU build has no use for it."
TORCHVISION = "For images only, and it must match the build of torch; the index has none for a CPU build."

KNOWN_EXCEPTIONS = {
    ("unsloth", "certifi"): CERTIFI,
    ("unsloth-zoo", "certifi"): CERTIFI,
    ("unsloth", "xformers"): XFORMERS,
    ("unsloth", "triton"): TRITON,
    ("unsloth-zoo", "triton"): TRITON,
    ("cut-cross-entropy", "triton"): TRITON,
    ("unsloth", "torchvision"): TORCHVISION,
}
COLAB_HAS = {"triton", "torchvision"}
COMPILED = {"llama-cpp-python", "diskcache"}  # there, by autosloth/export/llama.py, while the model trains


def linux(python):
    """The markers of a Linux machine with this Python, what this test itself runs on notwithstanding."""
    system = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    return system | {"python_version": python, "python_full_version": f"{python}.0"}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_both_files_together_are_complete(python):
    packages = pinned(ON_COLAB, BARE) | {"autosloth": ("0", NEEDED)}
    assert unmet(packages, linux(python)) == set(KNOWN_EXCEPTIONS)


def test_laid_over_colab_nothing_is_missing_or_refused():
    # The image is one day's (the data file says which), and only the part of it that AutoSloth meets: what its imports
    # lead to, and neighbours that bound those (gcsfs holds fsspec at its own version, hence we leave fsspec alone).
    # Colab's Jupyter and CUDA libraries are taken as they are. What the pins require is read from the ones installed
    # here, also when that is under another Python than Colab's: their wheels state the same for both.
    image = json.loads((HOME / "tests/colab_2026-08.json").read_text())["packages"]
    as_shipped = {name: (package["version"], package["requires"]) for name, package in image.items()}
    compiled = {name: entry for name, entry in pinned(BARE).items() if name in COMPILED}
    assert compiled.keys() == COMPILED
    packages = as_shipped | pinned(ON_COLAB) | compiled | {"autosloth": ("0", NEEDED)}
    assert unmet(packages, linux("3.13")) == {known for known in KNOWN_EXCEPTIONS if known[1] not in COLAB_HAS}


def test_autosloth_imports_only_what_it_needs():
    trees = [ast.parse(path.read_text()) for path in (HOME / "autosloth").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    modules = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"autosloth"}
    modules -= {"google"}  # google.colab, which only Colab has
    modules -= {"conversion", "gguf"}  # llama.cpp's converter, out of llama-cpp-python's source package
    modules -= {"vllm"}  # which answers in self-play where it is there and asked for
    modules -= {"nbclient", "nbformat"}  # notebook/headless.py, which runs notebooks where no front end does
    owners = packages_distributions()
    assert [name for name in modules if not set(map(canonicalize_name, owners.get(name, []))) & set(NEEDED)] == []
