"""`python -m autosloth.notebook NOTEBOOK.ipynb`: run a notebook headless."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .headless import execute

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m autosloth.notebook",
        description="Run a notebook headless and print what its cells print. Its settings are given as AUTOSLOTH_<SETTING>, for example AUTOSLOTH_MODEL=demo.",
    )
    parser.add_argument("notebook", type=Path, metavar="NOTEBOOK.ipynb")
    path = parser.parse_args().notebook
    if not path.is_file():
        parser.error(f"there is no notebook {path}")
    from nbclient.exceptions import CellExecutionError

    try:
        execute(path)
    except CellExecutionError as error:
        sys.exit(f"\n{error.ename}: {error.evalue}")
