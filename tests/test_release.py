"""`make release`: one address, one version, one hash everywhere; and the install cell takes what has that hash, and nothing else."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
from support import releases
from support.environments import borrowing
from support.releases import HOME, VERSION, WHEEL, checked_out, git, install_cell, release

RUN_CELL = "from IPython.core.interactiveshell import InteractiveShell; import sys; sys.exit(not InteractiveShell.instance().run_cell(sys.stdin.read()).success)"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return checked_out(tmp_path_factory.mktemp("checkout") / "repository")


@pytest.fixture(scope="module")
def released(checkout, tmp_path_factory):
    """The same after `make release`, and what that printed."""
    folder = tmp_path_factory.mktemp("released") / "repository"
    return folder, releases.released(checkout, folder)


@pytest.fixture(scope="module")
def served(released, tmp_path_factory):
    with releases.served(released[0], tmp_path_factory.mktemp("served")) as there:
        yield there


def test_address_version_and_hash_stand_everywhere(released):
    folder, said = released
    digest = re.search(r"SHA-256 (\w{64})", said)[1]
    assert f'home, version, sha256 = "{HOME}", "{VERSION}", "{digest}"' in install_cell(folder)
    assert f'version = "{VERSION}"' in (folder / "pyproject.toml").read_text()
    readme = (folder / "README.md").read_text()
    for name in ("AutoSloth-SFT", "AutoSloth-DPO", "SPIN-iter"):
        colab = f"(https://colab.research.google.com/github/some-one/their-sloth/blob/main/notebooks/{name}.ipynb)"
        kaggle = f"(https://kaggle.com/kernels/welcome?src={HOME}/blob/main/notebooks/{name}.ipynb)"
        first = "".join(json.loads((folder / "notebooks" / f"{name}.ipynb").read_text())["cells"][0]["source"])
        assert colab in readme and colab in first and kaggle in first and re.match("# .*\n\n\\[!", first)
    assert re.search(rf"^## {VERSION}, \d{{4}}-\d\d-\d\d\n\n- More", (folder / "CHANGELOG.md").read_text(), re.M)
    commands = [line.split()[0] for line in said.partition("To publish it:\n")[2].splitlines()]
    assert commands == ["git", "git", "gh"] and f"dist/{WHEEL}" in said


def test_a_wheel_that_is_built_again_has_the_hash_that_the_notebooks_hold(released):
    folder, said = released
    again = subprocess.run([sys.executable, "docs/release.py"], cwd=folder, capture_output=True, text=True)
    assert re.search(r"SHA-256 (\w{64})", again.stdout)[1] == re.search(r"SHA-256 (\w{64})", said)[1]


def test_what_is_released_passes_the_test_of_addresses(released):
    told = ["-q", "-p", "no:cacheprovider", "tests/notebook/test_notebooks.py", "-k", "address"]
    done = subprocess.run([sys.executable, "-m", "pytest", *told], cwd=released[0], capture_output=True, text=True)
    assert not done.returncode and "3 passed" in done.stdout, done.stdout[-2000:]


def test_a_second_release_changes_the_names_and_nothing_else(released, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(released[0], folder)
    changelog = folder / "CHANGELOG.md"
    changelog.write_text(changelog.read_text().replace("# Changelog\n", "# Changelog\n\n## next, unreleased\n", 1))
    git(folder, "commit", "--quiet", "--all", "-m", "released")
    before = {path: path.read_text() for path in folder.glob("notebooks/*.ipynb")} | {
        "readme": (folder / "README.md").read_text()
    }
    assert not release(folder, "https://github.com/other/home", "9.9.0").returncode
    for path in folder.glob("notebooks/*.ipynb"):
        back = path.read_text().replace("other/home", "some-one/their-sloth").replace("9.9.0", VERSION)
        hashless = partial(re.sub, r"[0-9a-f]{64}", "")
        assert hashless(back) == hashless(before[path])
    assert (folder / "README.md").read_text().replace("other/home", "some-one/their-sloth") == before["readme"]
    assert (folder / "pyproject.toml").read_text().count("[project.urls]") == 1


@pytest.mark.parametrize(
    ("home", "version", "what"),
    [
        ("/root", "1.2.3", "HOME=/root is not the address of a repository"),
        ("https://github.com/only-owner", "1.2.3", "is not the address of a repository"),
        (HOME, "", "VERSION= is not a version"),
        (HOME, "v1.2", "VERSION=v1.2 is not a version"),
        (HOME, "1.2.3", "Tracked files differ from the last commit (README.md)"),
    ],
)
def test_a_bad_release_is_refused_before_anything_is_written(checkout, home, version, what):
    readme = (checkout / "README.md").read_text()
    if "README" in what:
        (checkout / "README.md").write_text(readme + "\n")
    try:
        done = release(checkout, home, version)
    finally:
        (checkout / "README.md").write_text(readme)
    assert done.returncode == 1 and what in done.stderr and done.stderr.count("\n") == 1
    assert git(checkout, "status", "--porcelain") == "" and not (checkout / "dist").exists()


def test_make_hands_on_home_and_version(checkout):
    done = subprocess.run(["make", "--dry-run", "release", f"HOME={HOME}", "VERSION=1.2.3"], cwd=checkout, capture_output=True, text=True)  # fmt: skip
    assert f"env -u HOME .venv/bin/python docs/release.py '{HOME}' '1.2.3'" in done.stdout


# --- What the cell installs.


@pytest.fixture
def run_cell(tmp_path):
    """run(cell, folder) -> (succeeded, what it showed, the version of AutoSloth there is then) in a new environment."""
    python = borrowing(tmp_path / "venv")

    def run(cell, folder):
        done = subprocess.run([python, "-c", RUN_CELL], input=cell, cwd=folder, capture_output=True, text=True)
        site = next((tmp_path / "venv").glob("lib/python3*/site-packages"))
        return not done.returncode, done.stdout, [path.name for path in site.glob("autosloth-*.dist-info")]

    return run


def test_the_cell_installs_what_has_the_hash(released, served, run_cell, tmp_path):
    cell = install_cell(released[0]).replace(HOME, served[0])
    done, said, there = run_cell(cell, tmp_path)
    assert done and there == [f"autosloth-{VERSION}.dist-info"], said
    assert said.startswith(f"autosloth {VERSION}, ") and "GPU: " in said  # and not a word of an address that is missing


def test_the_cell_refuses_a_file_that_somebody_changed(released, served, run_cell, tmp_path):
    address, file = served
    whole = file.read_bytes()
    try:
        file.write_bytes(whole + b"\0")
        done, said, there = run_cell(install_cell(released[0]).replace(HOME, address), tmp_path)
    finally:
        file.write_bytes(whole)
    assert not done and there == [] and "DO NOT MATCH THE HASHES" in said
    assert said.rstrip().endswith("or get this notebook anew.") and "Traceback" not in said and "To exit" not in said


def test_without_an_address_the_cell_takes_the_wheel_that_lies_beside(checkout, released, run_cell, tmp_path):
    cell = re.sub(r'^(home, version, sha256 = "", )".*?"', rf'\1"{VERSION}"', install_cell(checkout), flags=re.M)
    done, said, there = run_cell(cell, tmp_path)
    assert not done and there == [] and "No matching distribution found" in said and "Traceback" not in said
    shutil.copy(released[0] / "dist" / WHEEL, tmp_path)
    done, said, there = run_cell(cell, tmp_path)
    assert done and there == [f"autosloth-{VERSION}.dist-info"], said
    assert said.startswith(f"No release has set an address yet: AutoSloth {VERSION} is looked for in ., ")
