"""The pins of requirements.txt and requirements-bare.txt, alone and laid over the packages of an image such as Colab's.

Packages are {name: (version, what it requires)} throughout.
"""

import tomllib
from functools import cache
from importlib.metadata import metadata, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

HOME = Path(__file__).parents[2]
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
        "rapidfuzz",
        "regex",
    ],
    *["torch", "numpy", "sentencepiece", "safetensors", "huggingface-hub", "llama-cpp-python", "pydantic", "pyyaml"],
    *["typer", "rich", "jinja2", "psutil", "packaging", "matplotlib", "ipywidgets", "ipython", "httpx", "filelock"],
    *["traitlets", "typing-extensions"],
    *["pyarrow", "fsspec", "aiohttp"],
]

CERTIFI = "Unsloth wants the certificates of its own month, which an index may not have yet; older ones do as well."
XFORMERS = "A faster attention for GPUs, hundreds of MB bound to one torch; torch's own attention stands in for it."
TRITON = "Compiles GPU kernels: a GPU build of torch brings the one that fits, a CPU build has no use for it."
PILLOW = "For the pictures of a tracker, which is told numbers alone here."
TORCHVISION = "For images only, and it must match the build of torch; the index has none for a CPU build."

KNOWN_EXCEPTIONS = {
    ("unsloth", "certifi"): CERTIFI,
    ("unsloth-zoo", "certifi"): CERTIFI,
    ("unsloth", "xformers"): XFORMERS,
    ("unsloth", "triton"): TRITON,
    ("unsloth-zoo", "triton"): TRITON,
    ("cut-cross-entropy", "triton"): TRITON,
    ("unsloth", "torchvision"): TORCHVISION,
    ("trackio", "pillow"): PILLOW,
}

# Packages of an image that state a bound which a pin oversteps; AutoSloth does not load them.
CUDF = "pandas on a GPU. Its older versions admit pyarrow only below 20, datasets wants 21."
SENTENCES = "Its older versions admit transformers only below 5."
KNOWN_BROKEN = {
    ("cudf-cu12", "pyarrow"): CUDF,
    ("pylibcudf-cu12", "pyarrow"): CUDF,
    ("sentence-transformers", "transformers"): SENTENCES,
}

ON_EVERY_IMAGE = {"triton", "torchvision", "pillow"}
COMPILED = {"llama-cpp-python", "diskcache"}  # there, by autosloth/export/llama.py, while the model trains


def lines(*files):
    """The requirement lines of these files, without comments."""
    bare = (line.partition("#")[0].strip() for file in files for line in (HOME / file).read_text().splitlines())
    return [Requirement(line) for line in bare if line]


@cache
def pinned(*files):
    """The packages that these files pin, their requirements as the installed distribution states them."""
    return {
        canonicalize_name(line.name): (str(line.specifier).removeprefix("=="), requires(line.name) or [])
        for line in lines(*files)
    }


def linux(python):
    """The markers of a Linux machine with this Python, what this process itself runs on notwithstanding."""
    system = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    return system | {"python_version": python, "python_full_version": f"{python}.0"}


read = cache(Requirement)  # the same lines come again and again


def stated(packages, environment, start):
    """Each requirement that holds, extras included, as (who states it, the requirement): of `start` and all they lead to."""
    seen, todo = set(), [(name, "") for name in start]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen or name not in packages:
            continue
        seen.add((name, extra))
        for needed in map(read, packages[name][1]):
            if needed.marker and not needed.marker.evaluate(environment | {"extra": extra}):
                continue
            yield name, needed
            todo += [(canonicalize_name(needed.name), wanted) for wanted in ["", *needed.extras]]


def meets(packages, needed):
    """Whether the packages hold what this requirement wants."""
    version, _ = packages.get(canonicalize_name(needed.name), (None, []))
    return version is not None and needed.specifier.contains(version, prereleases=True)


def unmet(packages, environment, start=None):
    """What `pip check` would complain of: {(package, what it requires)}; of `start` and all they lead to, or of every package."""
    every = stated(packages, environment, packages if start is None else start)
    return {(name, canonicalize_name(needed.name)) for name, needed in every if not meets(packages, needed)}


def laid_over(image):
    """The image's packages with requirements.txt installed over them, and what AutoSloth compiles itself."""
    compiled = {name: entry for name, entry in pinned(BARE).items() if name in COMPILED}
    return image | pinned(ON_COLAB) | compiled | {"autosloth": ("0", NEEDED)}


def lacking(image, environment):
    """What AutoSloth and all it leads to would not find in the image under the pins, or not in a version that they take."""
    return unmet(laid_over(image), environment, ["autosloth"])


def broken(image, environment):
    """The image's other packages that the pins break: {(package, what it requires)}, where that was met before."""
    return unmet(laid_over(image), environment) - unmet(image, environment) - lacking(image, environment)


def refusing(python):
    """{package: the Pythons that it takes}, of AutoSloth and the pins of requirements.txt that do not take this one."""
    own = tomllib.loads((HOME / "pyproject.toml").read_text())["project"]["requires-python"]
    takes = {name: metadata(name)["Requires-Python"] or "" for name in pinned(ON_COLAB)} | {"autosloth": own}
    return {name: wanted for name, wanted in takes.items() if f"{python}.0" not in SpecifierSet(wanted)}
