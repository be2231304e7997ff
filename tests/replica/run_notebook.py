"""Executes a notebook in the kernel of this environment and prints what its cells print: `run_notebook.py NOTEBOOK [watched]`.

watched: as where a person sits before it, whom the kernel may ask. Runs under an image's Python, with its versions of nbclient and nbformat.
"""

import contextlib
import sys

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


class Client(NotebookClient):
    async def async_start_new_kernel_client(self):
        client = await super().async_start_new_kernel_client()
        client.allow_stdin = sys.argv[2:] == ["watched"]
        return client


notebook = nbformat.read(sys.argv[1], as_version=4)
client = Client(notebook, timeout=None, kernel_name="python3")
with contextlib.suppress(CellExecutionError):
    client.execute()
outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
for output in outputs:
    print(output.get("text") or "\n".join(output.get("traceback", [])) or output.get("data", {}).get("text/plain", ""))
sys.exit(any(output.output_type == "error" for output in outputs))
