"""Builds the wheel that notebooks install; or makes a release: one address, one version, one hash, everywhere they stand.

    python docs/release.py                                           dist/autosloth-x.y.z-py3-none-any.whl
    python docs/release.py https://github.com/OWNER/NAME 1.2.3       the same, after it set pyproject, notebooks, README and changelog

`make wheel` and `make release HOME=... VERSION=...` call it. The card reads address and version from the installed package.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ("AutoSloth-SFT", "AutoSloth-DPO", "SPIN-iter")
COLAB = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{}/blob/main/notebooks/{}.ipynb)"
KAGGLE = "[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/{}/blob/main/notebooks/{}.ipynb)"


def main(home: str = "", version: str = "") -> None:
    """Build the wheel; with a home and a version, make everything else name it."""
    owner_and_name = home.removeprefix("https://github.com/")
    if home or version:
        refuse_bad(home, version)
        set_names(home, version)
    wheel = build_wheel()
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    print(f"{wheel.relative_to(ROOT)}, SHA-256 {digest}")
    if home:
        for notebook in NOTEBOOKS:
            address_notebook(notebook, owner_and_name, (home, version, digest))
        print("To publish it:")
        print(f"  git commit --all --message 'AutoSloth {version}' && git tag v{version}")
        print(f"  git push {home} HEAD:main v{version}")
        print(f"  gh release create v{version} {wheel.relative_to(ROOT)} --repo {owner_and_name} --generate-notes")


def set_names(home: str, version: str) -> None:
    """Address and version in pyproject.toml, README.md and CHANGELOG.md."""
    urls = r'(\n\[project\.urls\]\nHome = ".*"\n)?\n\[project\.scripts\]'
    edit("pyproject.toml", r'^version = ".*"$', f'version = "{version}"')
    edit("pyproject.toml", urls, f'\n[project.urls]\nHome = "{home}"\n\n[project.scripts]')
    edit("CHANGELOG.md", r"^## .*, unreleased$", f"## {version}, {date.today()}")
    for notebook in NOTEBOOKS:
        badge = COLAB.format(home.removeprefix("https://github.com/"), notebook)
        edit("README.md", rf"^(\| {notebook}: .*\|) .* \|$", rf"\1 {badge} |")


def refuse_bad(home: str, version: str) -> None:
    """End with a sentence where no release can be made of this."""
    if not re.fullmatch(r"https://github\.com/[\w-]+/[\w.-]+", home):
        sys.exit(
            f"HOME={home} is not the address of a repository. Give one such as HOME=https://github.com/OWNER/NAME."
        )
    if not re.fullmatch(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}", version):
        sys.exit(f"VERSION={version} is not a version. Give one such as VERSION=1.2.3.")
    if changed := git("status", "--porcelain", "--untracked-files=no"):
        sys.exit(
            f"Tracked files differ from the last commit ({changed.split()[1]}). Commit or undo that first: a release is a commit of its own."
        )
    if not re.search(r"^## .*, unreleased$", (ROOT / "CHANGELOG.md").read_text(), re.M):
        sys.exit(
            "CHANGELOG.md has no section that is unreleased. Begin one with `## x.y.z, unreleased` and write into it what is new."
        )


def build_wheel() -> Path:
    """The wheel of the tracked files, and of nothing that an earlier build left, in dist/."""
    (ROOT / "dist").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name in filter(
            None,
            git("ls-files", "-z", "autosloth", "pyproject.toml", "requirements.txt", "README.md", "LICENSE").split(
                "\0"
            ),
        ):
            copy = Path(scratch, "source", name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--no-build-isolation",
        ]
        same_times = os.environ | {"SOURCE_DATE_EPOCH": "315532800"}  # else each build would have a hash of its own
        subprocess.run([*pip, f"--wheel-dir={scratch}", f"{scratch}/source"], check=True, env=same_times)
        built = next(Path(scratch).glob("*.whl"))
        return Path(shutil.copy(built, ROOT / "dist" / built.name))


def address_notebook(name: str, owner_and_name: str, installed: tuple[str, str, str]) -> None:
    """Its install cell takes (home, version, hash) and nothing else; its badges open it from there."""
    path = ROOT / "notebooks" / f"{name}.ipynb"
    notebook = json.loads(path.read_text())
    line = "home, version, sha256 = " + ", ".join(f'"{value}"' for value in installed)
    for cell in notebook["cells"]:
        text = re.sub(r"^home, version, sha256 = .*$", line, "".join(cell["source"]), flags=re.M)
        cell["source"] = text.splitlines(keepends=True)
    title, *story = [line for line in notebook["cells"][0]["source"] if "[![Open in " not in line]
    badges = [f"{badge.format(owner_and_name, name)}\n" for badge in (COLAB, KAGGLE)]
    story = "".join(story).lstrip("\n").splitlines(keepends=True)
    notebook["cells"][0]["source"] = [title, "\n", *badges, "\n", *story]
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def edit(name: str, old: str, new: str) -> None:
    """Replace the one place that this pattern finds."""
    text, count = re.subn(old, new, (ROOT / name).read_text(), flags=re.M)
    assert count == 1, (name, old, count)
    (ROOT / name).write_text(text)


def git(*command: str) -> str:
    return subprocess.run(["git", *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


if __name__ == "__main__":
    main(*sys.argv[1:])
