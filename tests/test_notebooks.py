"""Notebooks are a form and a story: short cells that call the library, no outputs, one home address."""

import json
import re
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
HOME = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Home"]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return json.loads(request.param.read_text())


def code_of(notebook):
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_nothing_is_stored_but_the_source(notebook):
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and not cell.get("execution_count")


def test_cells_are_few_short_and_define_nothing(notebook):
    cells = code_of(notebook)
    assert len(cells) <= 10
    for cell in cells:
        lines = [line for line in cell.splitlines() if line.strip() and not line.startswith(("#", "import ", "from "))]
        assert len(lines) <= 8, cell
        assert not re.search(r"^\s*(def|class|if False)\b", cell, re.M), cell


def test_prose_stands_before_every_code_cell(notebook):
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    assert all(before == "markdown" for before, kind in pairwise(kinds) if kind == "code") and kinds[0] == "markdown"


def test_colab_gets_a_gpu_and_hidden_form_cells(notebook):
    assert notebook["metadata"]["accelerator"] == "GPU" and notebook["metadata"]["colab"]["gpuType"] in {"T4", "A100"}
    for cell in notebook["cells"]:
        if "".join(cell["source"]).startswith("# @title"):
            assert cell["metadata"]["cellView"] == "form"


def test_the_home_address_and_version_are_those_of_pyproject(notebook):
    text = json.dumps(notebook)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f'home, version = \\"{HOME}\\", \\"v{version}\\"' in text
    owner_and_name = HOME.removeprefix("https://github.com/")
    assert set(re.findall(r"github(?:\.com)?/([\w-]+/[\w-]+)", text.replace("https://github.com/", "github/"))) == {
        owner_and_name
    }


def test_every_value_of_the_settings_cell_is_the_declared_default(notebook):
    from autosloth.settings import SFTSettings

    cell = next(cell for cell in code_of(notebook) if "# @title Settings" in cell)
    shown = re.findall(r"^(\w+) = (.+?)  # @param", cell, re.M)
    fields = {name: value for name, value in shown if name in SFTSettings.model_fields}
    assert len(fields) >= 4
    for name, value in fields.items():
        assert (
            json.loads(value.replace("False", "false").replace("True", "true"))
            == SFTSettings.model_fields[name].default
        ), name
