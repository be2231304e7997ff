"""A whole notebook with a token, typed or given, published to a Hub on loopback: the token is in no file that the run leaves."""

import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from support.commands import DEMO
from support.hub_server import HubServer
from support.patience import AT_ANY_SPEED

TOKEN = "hf_MARKED" + "Zq7x" * 8
ROOT = Path(__file__).parents[2]
WATCHED = "import autosloth.form.form\nautosloth.form.form.front_end_attached = lambda: True"
TYPED = "form.token.value = TOKEN\nassert form.token.value == ''"
SHORT = {**DEMO, "max_steps": 10, "eval_answers": 2, "publish_to_hub": True, "repo": "team/sloth", "storage": "runs"}


def cells_of(path, typed):
    """The notebook's cells; where the token is typed, with a person at the form."""
    notebook = nbformat.read(path, as_version=4)
    if typed:
        form = next(i for i, cell in enumerate(notebook.cells) if "# @title The form" in cell.source)
        kept = f"import pathlib\nTOKEN = pathlib.Path({str(typed)!r}).read_text()"  # else it would stand in the cell
        notebook.cells.insert(form + 1, nbformat.v4.new_code_cell(f"{kept}\n{TYPED}"))
        notebook.cells.insert(form, nbformat.v4.new_code_cell(WATCHED))
    return notebook


def variables(hub, home, token):
    """The environment of a kernel that knows the Hub on loopback and these settings."""
    mine = [name for name in os.environ if name.startswith("AUTOSLOTH_") and name != "AUTOSLOTH_CACHE"]
    given = {f"AUTOSLOTH_{name.upper()}": json.dumps(value) for name, value in SHORT.items()}
    known = {name: value for name, value in hub.env(home, token).items() if name not in mine}
    return known | given | {"IPYTHONDIR": str(home / ".ipython"), "PATH": os.environ["PATH"]}


@pytest.mark.slow
@pytest.mark.parametrize("name, how", [("AutoSloth-SFT", "typed"), ("AutoSloth-DPO", "environment")])
def test_a_token_is_used_and_is_in_no_file(base, tmp_path, name, how):
    home, work, secret = (tmp_path / name for name in ("home", "work", "secret"))
    home.mkdir(), work.mkdir()
    secret.write_text(TOKEN)
    notebook = cells_of(ROOT / "notebooks" / f"{name}.ipynb", secret if how == "typed" else None)
    with HubServer() as hub:
        hub.add_token(TOKEN, user="team")
        environment = variables(hub, home, None if how == "typed" else TOKEN)
        client = NotebookClient(
            notebook, kernel_name="python3", resources={"metadata": {"path": str(work)}}, **AT_ANY_SPEED
        )
        client.execute(env=environment)
        assert any(file.endswith("-Q8_0.gguf") for file in hub.files("model", "team/sloth-GGUF"))
        assert not hub.outside
    nbformat.write(notebook, work / "with-state.ipynb")
    del notebook.metadata["widgets"]
    nbformat.write(notebook, work / "without-state.ipynb")
    files = [file for folder in (home, work) for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 20 and not [file for file in files if TOKEN.encode() in file.read_bytes()]
