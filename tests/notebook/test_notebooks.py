"""Notebooks are a form and a story: short cells that call the library, no outputs, one home address."""

import ast
import json
import re
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from support.commands import NOTEBOOK_OF

from autosloth.run import read_json

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
HOME = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {}).get("Home", "")


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
        most = 16 if "# @title Install" in cell else 8  # nothing is there yet that it could call
        lines = [line for line in cell.splitlines() if line.strip() and not line.startswith(("#", "import ", "from "))]
        assert len(lines) <= most, cell
        assert not re.search(r"^\s*(def|class|if False)\b", cell, re.M), cell


def test_prose_stands_before_every_code_cell(notebook):
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    assert all(before == "markdown" for before, kind in pairwise(kinds) if kind == "code") and kinds[0] == "markdown"


def test_colab_gets_a_gpu_and_hidden_form_cells(notebook):
    assert notebook["metadata"]["accelerator"] == "GPU" and notebook["metadata"]["colab"]["gpuType"] in {"T4", "A100"}
    for cell in notebook["cells"]:
        if "".join(cell["source"]).startswith("# @title"):
            assert cell["metadata"]["cellView"] == "form"


def test_an_address_is_that_of_pyproject_and_stands_with_a_hash(notebook):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = json.dumps(notebook)
    home, version, digest = re.search(r'home, version, sha256 = \\"(.*?)\\", \\"(.*?)\\", \\"(.*?)\\"', text).groups()
    assert home == HOME and len(digest) == (64 if HOME else 0) and (not HOME or version == project["version"])
    named = set(re.findall(r"github(?:\.com)?/([\w-]+/[\w-]+)", text.replace("https://github.com/", "github/")))
    assert named == ({HOME.removeprefix("https://github.com/")} if HOME else set())


def test_every_switch_that_is_a_setting_stands_at_its_default_and_offers_what_may_be_chosen(notebook):
    from autosloth.settings import ROADS

    cell = next(cell for cell in code_of(notebook) if "# @title The form" in cell)
    road = ROADS[re.search(r'open_form\("(\w+)"', cell)[1]]
    switches = re.findall(r"^(\w+) = (.+?)  # @param (\[.*?\])", cell, re.M)
    assert [name for name, *_ in switches][:2] == ["first_run_all", "storage"]
    for name, value, choices in switches:
        assert json.loads(value) in json.loads(choices)
        if name in road.model_fields:
            assert json.loads(value) == road.model_fields[name].default and f"{name}={name}" in cell
            assert all(road(**{name: choice}) for choice in json.loads(choices))


def test_training_goes_on_with_what_the_form_holds(notebook):
    cells = code_of(notebook)
    gate = next(index for index, cell in enumerate(cells) if "settings = form.settings()" in cell)
    assert "form = open_form(" in cells[gate - 1] and cells[gate - 1].rstrip().endswith("\nform")
    assert "show_answers(run)" in cells[gate + 1]  # where it is trained


def test_the_cells_are_the_stages_of_the_road_in_their_order(notebook):
    """`roads.py` says which they are; what a cell calls with the run, and nothing else, is a stage."""
    from autosloth.roads import stages

    text = "\n".join(code_of(notebook))
    road = re.search(r'open_form\("(\w+)"', text)[1]
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    of_the_run = [call for call in calls if [ast.unparse(argument) for argument in call.args] == ["run"]]
    called = [call.func.id for call in sorted(of_the_run, key=lambda call: call.lineno)]
    assert called == [*(stage.__name__ for stage in stages(road)), "summary", "open_chat"]


@pytest.mark.parametrize("run, road", [("finished", "sft"), ("preferred", "dpo"), ("played", "spin")])
def test_each_notebook_runs_to_the_end_on_the_demo(request, run, road):
    """nbmake executes it (`whole_road`); other tests look at what it leaves."""
    folder = request.getfixturevalue(run)
    assert (folder / "publish" / "README.md").is_file() and read_json(folder / "settings.json")["road"] == road
    assert {*NOTEBOOK_OF.values()} == {path.name for path in NOTEBOOKS}


@pytest.mark.parametrize(
    "title", ["1. Install", "2. Fill in the form", "3. ", "5. Export", "6. Prove it", "7. Card", "8. What", "9. Talk"]
)
def test_notebooks_do_the_same_in_the_same_words(title):
    """Under each of these headings the code cell is the same in all, but for the road's name in the form's."""
    found = set()
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text())["cells"]
        heading = next(i for i, cell in enumerate(cells) if "".join(cell["source"]).startswith(f"## {title}"))
        found.add(re.sub(r'open_form\("\w+"', "open_form(ROAD", "".join(cells[heading + 1]["source"])))
    assert len(found) == 1
