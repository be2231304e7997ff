"""Says what breaks once requirements.txt is laid over an image: run it on Colab's list when Colab moves.

    python tests/replica/newer.py pip-freeze.gpu.txt --python 3.13

The list is what `pip freeze` says there; of several lists the later ones go before. What the image's packages require is
read from the package index (PIP_INDEX_URL, or pypi.org) and kept, so a second run is quick. Ends with 1 where something
breaks. `--write tests/replica/NAME.json` writes the part of the image that tests/test_requirements.py reads.
"""

import argparse
import io
import json
import os
import re
import sys
import textwrap
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote, urlsplit

sys.path += map(str, Path(__file__).resolve().parents[1:3])  # run as a script, only its own folder is there

import httpx
from packaging.metadata import parse_email
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import InvalidVersion, Version
from support.pins import (
    KNOWN_BROKEN,
    KNOWN_EXCEPTIONS,
    ON_COLAB,
    broken,
    lacking,
    laid_over,
    linux,
    meets,
    pinned,
    refusing,
    stated,
)

from autosloth.run import cache_dir

INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
JSON = {"Accept": "application/vnd.pypi.simple.v1+json"}
NOT_THERE = (403, 404)
AT_ONCE = 16
NEWEST = "3.13"  # the Python of the newest Colab known
PART = 2**16  # bytes

# Taken as the image has it: a notebook runs on it already.
JUPYTER = {
    *["comm", "ipykernel", "ipython", "ipywidgets", "jedi", "jupyter-client", "jupyter-core", "jupyterlab-widgets"],
    *["nbclient", "nbformat", "tornado", "traitlets", "widgetsnbextension"],
}
OF_THE_BUILD = ("nvidia-", "cuda-")  # what torch requires on the index is for another CUDA than Colab's build is for
ABOVE = {"<", "<=", "==", "===", "~=", "!="}
ABOUT = (
    "Written by tests/replica/newer.py. Of the image's {} packages those that AutoSloth and its pins lead to, those that bound these, "
    "and Jupyter (versions only). 'requires' is each version's Requires-Dist on the package index as far as it holds on Linux x86_64 "
    "under this Python: for a neighbour only what concerns a package listed here, and without CUDA libraries where the image has a build "
    "of its own (+cu128 and the like)."
)


class Refusal(Exception):
    """Ends the run with one sentence."""


def version_in(address):
    """The version in the name of the file at an address, None where it has none (git)."""
    name = unquote(urlsplit(address).path).rpartition("/")[2]
    for parse in (parse_wheel_filename, parse_sdist_filename):
        try:
            return str(parse(name)[1])
        except (InvalidWheelFilename, InvalidSdistFilename, InvalidVersion):
            pass
    return None


def read_line(line):
    """(name, version) of a line as `pip freeze` writes it; the version is None where the line does not tell one."""
    if line.startswith("-e "):
        return canonicalize_name(line.rpartition("egg=")[2]), None
    name, at, address = line.partition(" @ ")
    if at:
        return canonicalize_name(Requirement(name).name), version_in(address)
    needed = Requirement(line)
    exact = re.fullmatch(r"={2,3}([^*,]+)", str(needed.specifier))
    if not exact:
        raise InvalidRequirement(line)
    return canonicalize_name(needed.name), str(Version(exact[1]))


def read_list(path):
    """{name: version} of a list in the form of `pip freeze`."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        bare = re.sub(r"(^|\s)#.*", "", line).strip()
        try:
            found |= [read_line(bare)] if bare else []
        except (InvalidRequirement, InvalidVersion):
            raise Refusal(f"{path} is no list as `pip freeze` writes it: line {number} is {line[:80]!r}.") from None
    if not found:
        raise Refusal(f"{path} lists no package.")
    return found


def wheel(files, version):
    """Of an index's files the wheel of this version, for Linux or any system where there are several; None without one."""
    names = [file["filename"] for file in files if file["filename"].endswith(".whl")]
    fits = {name for name in names if version_in(name) == version}
    found = [file for file in files if file["filename"] in fits]
    return max(found, key=lambda file: bool(re.search(r"(linux.*x86_64|any)\.whl$", file["filename"])), default=None)


def get(client, address):
    """The answer of the index, None where it has nothing there."""
    answer = client.get(address, headers=JSON)
    if answer.status_code in NOT_THERE:
        return None
    return answer.raise_for_status()


def fetch(client, name, version):
    """The metadata of a version on the index, None where it has no wheel of it."""
    page = get(client, f"{INDEX}/{name}/")
    file = page and wheel(page.json()["files"], version)
    if not file:
        return None
    address = page.url.join(file["url"])
    beside = get(client, address.copy_with(path=f"{address.path}.metadata"))
    return beside.text if beside else inside(client, address)


class Distant(io.RawIOBase):
    """A file of the index, read in the parts that are asked for."""

    def __init__(self, client, address):
        self.client, self.address, self.place = client, address, 0
        self.size = int(client.head(address).raise_for_status().headers["Content-Length"])

    def readable(self):
        return True

    seekable = readable

    def seek(self, offset, whence=io.SEEK_SET):
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        return self.place

    def readinto(self, buffer):
        last = min(self.place + len(buffer), self.size) - 1
        if last < self.place:
            return 0
        part = self.client.get(self.address, headers={"Range": f"bytes={self.place}-{last}"}).raise_for_status().content
        buffer[: len(part)] = part
        self.place += len(part)
        return len(part)


def inside(client, address):
    """The metadata out of a wheel, for an index that does not have it beside; the rest of the wheel is not read."""
    with zipfile.ZipFile(io.BufferedReader(Distant(client, address), PART)) as archive:
        names = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
        return archive.read(names[0]).decode() if names else None


def requirements(client, name, version):
    """What a version requires, as the index says; None where it does not. Kept for the next run."""
    kept = cache_dir() / "metadata" / f"{name}-{version}.txt"
    if not kept.is_file():
        text = fetch(client, name, version)
        if text is None:
            return None
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(text)
    return [line for line in parse_email(kept.read_text())[0].get("requires_dist", []) if is_requirement(line)]


def is_requirement(line):
    """Whether this is one by today's rules; a few old packages state others."""
    try:
        Requirement(line)
    except InvalidRequirement:
        return False
    return True


def look_up(versions):
    """The packages of an image, and the names of those whose requirements the index does not tell."""
    with httpx.Client(timeout=60, follow_redirects=True, transport=httpx.HTTPTransport(retries=3)) as client:

        def one(name):
            version = versions[name]
            return version and requirements(client, name, Version(version).public)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = dict(zip(versions, pool.map(one, versions), strict=True))
    packages = {
        name: (version, mine(name, version, found[name] or [])) for name, version in versions.items() if version
    }
    return packages, sorted(name for name in versions if found[name] is None)


def mine(name, version, required):
    """What counts of a package's requirements here."""
    if name in JUPYTER:
        return []
    own_build = Version(version).local is not None
    return [
        line
        for line in required
        if not (own_build and canonicalize_name(Requirement(line).name).startswith(OF_THE_BUILD))
    ]


def extract(image, python):
    """The part of an image that AutoSloth meets."""
    environment, pins, over = linux(python), pinned(ON_COLAB), laid_over(image)
    reached = {canonicalize_name(needed.name) for _, needed in stated(over, environment, ["autosloth"])} & set(image)
    every = stated(image, environment, image)
    near = {name for name, needed in every if canonicalize_name(needed.name) in reached and bounds(needed, pins)}
    kept = reached | near | JUPYTER & set(image)
    required = {name: set() for name in kept}
    for packages in (image, over):  # the two ask for different extras
        part = {name: entry for name, entry in packages.items() if name in kept or name not in image}
        for name, needed in stated(part, environment, part):
            own = part[name] == image.get(name)
            if own and (name in reached or canonicalize_name(needed.name) in kept):
                required[name].add(str(needed))
    return {name: {"version": image[name][0], "requires": sorted(required[name])} for name in sorted(kept)}


def bounds(needed, pins):
    """Whether a requirement may stand against a pin: one from above, or any of a package that is pinned."""
    above = any(one.operator in ABOVE for one in needed.specifier)
    return above or (bool(needed.specifier) and canonicalize_name(needed.name) in pins)


def write(path, lists, python, image):
    """Write the extract, a package a line."""
    packages = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in extract(image, python).items()]
    head = {"lists": [Path(one).name for one in lists], "python": python, "about": ABOUT.format(len(image))}
    text = json.dumps(head, indent=1).removesuffix("\n}")
    Path(path).write_text(f'{text},\n "packages": {{\n' + ",\n".join(packages) + "\n }\n}\n")


def told(pairs, image, environment):
    """A line for each (package, what it requires): what it wants, and what there is."""
    over, pins = laid_over(image), pinned(ON_COLAB)
    wanted = {
        (name, canonicalize_name(needed.name)): needed
        for name, needed in stated(over, environment, over)
        if not meets(over, needed)
    }
    for name, other in sorted(pairs):
        there = over.get(other, ("none",))[0]
        has = f"the pin is {there}" if other in pins else f"the image has {there}"
        yield f"{name} {over[name][0]} wants {other}{wanted[name, other].specifier}, {has}"


def overtaken(image):
    """A line for each pin that the image has by itself, in that version or a newer one."""
    for name, (pin, _) in sorted(pinned(ON_COLAB).items()):
        there = image.get(name, ("0",))[0]
        if Version(there) >= Version(pin):
            yield f"{name}: the pin is {pin}, the image has {there}"


def report(image, unseen, python):
    """Print what breaks and what else the pins meet; returns whether something breaks."""
    environment = linux(python)
    refused = [f"{name} wants Python {wanted}" for name, wanted in refusing(python).items()]
    missing, hurt = lacking(image, environment), broken(image, environment)
    known = missing & KNOWN_EXCEPTIONS.keys() | hurt & KNOWN_BROKEN.keys()
    lost, hurt = told(missing - known, image, environment), told(hurt - known, image, environment)
    breaks = [
        paragraph(f"Not for Python {python}:", refused),
        paragraph("Missing in the image, or refused:", lost),
        paragraph("Whole in the image, broken by a pin:", hurt),
    ]
    print(f"{len(image)} packages under Python {python}.")
    if unseen:
        print(f"Not looked at, as the index has no wheel of them: {len(unseen)}")
        print(
            textwrap.fill(", ".join(unseen), 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
        )
    for one in [*breaks, paragraph("Pins that the image has by itself, as new or newer:", overtaken(image))]:
        print(one, end="\n" if one else "")
    print(
        f"Known and accepted in tests/support/pins.py: {len(known)}." + ("" if any(breaks) else " Nothing else breaks.")
    )
    return any(breaks)


def paragraph(heading, lines):
    """The heading with its lines; nothing without lines."""
    lines = list(lines)
    return "\n  ".join([heading, *lines]) if lines else ""


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lists", nargs="+", metavar="LIST", help="what `pip freeze` says; later ones go before")
    parser.add_argument("--python", default=NEWEST, help=f"the image's Python, {NEWEST} by itself")
    parser.add_argument("--write", metavar="FILE", help="write what tests/test_requirements.py reads")
    options = parser.parse_args(arguments)
    try:
        if not re.fullmatch(r"3\.\d+", options.python):
            raise Refusal(f"--python is like {NEWEST}, not {options.python!r}.")
        versions = {name: version for one in options.lists for name, version in read_list(one).items()}
        image, unseen = look_up(versions)
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return 2
    except (httpx.HTTPError, json.JSONDecodeError) as error:
        print(f"The index at {INDEX} does not answer as one: {error}", file=sys.stderr)
        return 2
    if options.write:
        write(options.write, options.lists, options.python, image)
    return int(report(image, unseen, options.python))


if __name__ == "__main__":
    sys.exit(main())
