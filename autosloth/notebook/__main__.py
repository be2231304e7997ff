"""`python -m autosloth.notebook NOTEBOOK.ipynb`: run a notebook headless."""

from __future__ import annotations

import sys
from pathlib import Path

from .headless import execute

if __name__ == "__main__":
    from nbclient.exceptions import CellExecutionError

    try:
        execute(Path(sys.argv[1]))
    except CellExecutionError as error:
        sys.exit(f"\n{error.ename}: {error.evalue}")
