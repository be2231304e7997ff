"""A release of this repository as it stands, made in a copy, and a server that hands out its wheel as GitHub does."""

import contextlib
import http.server
import json
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOME, VERSION = "https://github.com/some-one/their-sloth", "9.8.7"
WHEEL = f"autosloth-{VERSION}-py3-none-any.whl"


def git(folder, *command):
    told = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *told, *command], cwd=folder, capture_output=True, text=True, check=True).stdout


def release(checkout, *told):
    return subprocess.run([sys.executable, "docs/release.py", *told], cwd=checkout, capture_output=True, text=True)


def checked_out(folder):
    """Fill a folder with this repository as it stands here, all of it committed, with something unreleased in its changelog."""
    left_out = shutil.ignore_patterns(".git", ".venv", "runs", "dist", "build", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=left_out)
    changelog = folder / "CHANGELOG.md"
    text = changelog.read_text().replace("# Changelog\n", "# Changelog\n\n## next, unreleased\n\n- More.\n", 1)
    changelog.write_text(text.replace("## 0.1.0, unreleased", "## 0.1.0, 2026-01-01"))
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "-m", "as it stands")
    return folder


def released(checkout, folder):
    """What `make release` prints in a copy of a checkout."""
    shutil.copytree(checkout, folder)
    done = release(folder, HOME, VERSION)
    assert not done.returncode, done.stderr
    return done.stdout


def install_cell(folder, notebook="AutoSloth-SFT.ipynb"):
    cells = json.loads((folder / "notebooks" / notebook).read_text())["cells"]
    return next(text for cell in cells if "# @title Install" in (text := "".join(cell["source"])))


@contextlib.contextmanager
def served(checkout, folder):
    """(the address of a server that hands out the released wheel as GitHub does, the file that it hands out)."""
    file = folder / "releases" / "download" / f"v{VERSION}" / WHEEL
    file.parent.mkdir(parents=True)
    shutil.copy(checkout / "dist" / WHEEL, file)
    handler = partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", file
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Says nothing of what it hands out."""

    def log_message(self, *_):
        pass
