"""Run a notebook headless and print what its cells print, while they print it: `python -m autosloth.notebook NOTEBOOK.ipynb`.

The notebook's file stays as it is: its outputs go to the terminal.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any


def plain(text: str) -> str:
    """The text, without the escape codes for colours and the like where no terminal shows them."""
    return text if sys.stdout.isatty() else re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", text)


def execute(path: Path) -> None:
    """Execute all cells in this directory's kernel. Raises nbclient's CellExecutionError at the first cell that fails."""
    import nbformat
    from nbclient import NotebookClient

    class Printing(NotebookClient):
        def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
            if msg["msg_type"] == "stream":
                print(plain(msg["content"]["text"]), end="", flush=True)
            elif msg["msg_type"] == "display_data":
                print(plain(msg["content"]["data"].get("text/plain", "")), flush=True)
            return super().process_message(msg, cell, cell_index)

    Printing(nbformat.read(path, as_version=4), timeout=None, kernel_name="python3").execute()
