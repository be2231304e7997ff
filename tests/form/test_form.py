"""The form on the widgets of this environment (test_front_ends.py runs it on Colab's and Kaggle's too): what is chosen is what is used."""

import html
import json
import os
import re
import sys
from datetime import datetime, timezone
from pathlib import Path

import ipywidgets
import pytest
import yaml
from support.patience import AT_ANY_SPEED

from autosloth.errors import SettingsError
from autosloth.form import form as forms
from autosloth.form.form import GROUPS, Paused, open_form
from autosloth.notebook import runtime
from autosloth.settings import SFTSettings

TOKEN = "hf_MARKEDmarkedMARKED"


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A folder of its own, no token, a kernel just started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(forms, "_stores", {})
    monkeypatch.setattr(forms, "_stopped", set())
    monkeypatch.setattr(forms, "LATE", 0)
    monkeypatch.setattr(runtime, "_given", {})
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ["HF_TOKEN", *(name for name in os.environ if name.startswith("AUTOSLOTH_"))]:
        monkeypatch.setenv(name, "")  # so that what a test puts there is taken back
        monkeypatch.delenv(name)


@pytest.fixture
def watched(monkeypatch):
    """Someone sits in front of it."""
    monkeypatch.setattr(forms, "front_end_attached", lambda: True)


def upload(widget, name, content):
    """Put a file into a FileUpload as the front end does, in the form of this release of ipywidgets."""
    file = {"name": name, "type": "", "size": len(content), "last_modified": datetime.now(timezone.utc)}
    if ipywidgets.__version__ < "8":
        widget.set_trait("value", {name: {"metadata": file, "content": content}})
    else:
        widget.value = ({**file, "content": memoryview(content)},)


def all_widgets():
    return ipywidgets.Widget.widgets if ipywidgets.__version__ < "8" else ipywidgets.widgets.widget._instances


def state_of_all_widgets():
    """Everything that a front end could save of the widgets."""
    return json.dumps([widget.get_state() for widget in all_widgets().values()], default=str)


@pytest.mark.parametrize("road", ["sft", "dpo", "spin"])
def test_a_form_is_few_messages(road, watched):
    """Each widget, layout and style is one; of 1000 that wait for a slow front end ZeroMQ drops the next, the display among them."""
    before = len(all_widgets())
    open_form(road)
    assert 50 < len(all_widgets()) - before < 600


def test_every_setting_has_a_labelled_widget_with_its_help_in_its_group():
    form = open_form("sft")
    assert list(form.fields) == list(SFTSettings.model_fields)
    for field in form.fields.values():
        beside = re.sub("</?code>", "`", html.unescape(field.row.children[0].children[-1].value))
        assert field.widget.description and field.info.description in beside and field.extra["group"] in GROUPS
    front = [name for name, field in form.fields.items() if field.extra["front"]]
    assert len(front) <= 20 and {"model", "dataset", "max_steps", "repo"} <= set(front)


OTHERWISE = {
    "model": "me/base", "dataset": "me/data", "max_length": 512, "load_in_4bit": False, "chat_template": "zephyr",
    "learning_rate": 1e-5, "columns": "{frage: prompt}", "quantizations": (), "revision": "v2", "repo": "me/out",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_is_chosen_in_each_kind_of_widget_is_used_also_when_the_form_cell_runs_again(name):
    form = open_form("sft")
    form.fields[name].widget.value = OTHERWISE[name]
    expected = SFTSettings(**yaml.safe_load(Path("AutoSloth-SFT.yaml").read_text()))
    assert getattr(expected, name) != getattr(SFTSettings(), name)
    assert form.settings() == open_form("sft").settings() == expected
    forms._stores.clear()  # what a restarted kernel knows
    assert open_form("sft").settings() == expected == SFTSettings.load("AutoSloth-SFT.yaml")


def test_straight_away_it_is_the_defaults_and_it_says_so(capsys):
    assert open_form("sft", storage="runs").settings() == SFTSettings()
    assert "settings: the defaults\n" in capsys.readouterr().out and not Path("AutoSloth-SFT.yaml").exists()


def test_what_differs_from_the_defaults_is_printed(capsys):
    form = open_form("sft")
    form.fields["seed"].widget.value = 7
    form.settings()
    assert "settings: the defaults, but for\nseed: 7\n" in capsys.readouterr().out


def test_a_wrong_value_is_told_at_its_field_and_on_top_and_stops_run_all(watched):
    form = open_form("sft")
    form.fields["batch_size"].widget.value = "0"
    form.fields["seed"].widget.value = 7
    assert "batch_size is 0, but it should be at least 1." in form.fields["batch_size"].message.value
    assert "To correct: Batch size." in form.summary.value and not form.fields["seed"].message.value
    with pytest.raises(SettingsError, match=r"batch_size is 0.*Correct them in the form above"):
        form.settings()
    form.fields["batch_size"].widget.value = "4"
    assert form.settings() == SFTSettings(batch_size=4, seed=7) and "Ready" in form.summary.value


@pytest.mark.parametrize("typed", ["{a: prompt", "a", "[a]", "{a: nonsense}", "3"])
def test_a_mapping_that_is_none_is_told_at_its_field(typed):
    form = open_form("sft")
    form.fields["columns"].widget.value = typed
    assert "columns is " in form.fields["columns"].message.value and form.fields["columns"].widget.value == typed


def test_what_is_wrong_with_two_settings_together_is_told_on_top(watched):
    form = open_form("dpo")
    form.fields["label_smoothing"].widget.value = 0.1
    assert "To correct: label_smoothing counts for `loss: robust` only" in form.summary.value
    with pytest.raises(SettingsError, match="label_smoothing counts for"):
        form.settings()
    form.fields["loss"].widget.value = "robust"
    assert form.settings().label_smoothing == 0.1


@pytest.mark.parametrize("road", ["dpo", "spin"])
def test_the_forms_of_the_other_roads_show_and_use_what_is_chosen(road, capsys):
    form = open_form(road)
    form.fields["beta"].widget.value = 0.5
    form.fields["adapter"].widget.value = "me/adapter"
    settings = form.settings()
    assert (settings.road, settings.beta, settings.adapter) == (road, 0.5, "me/adapter")
    said = capsys.readouterr().out
    assert "beta: 0.5" in said and ("profile: t4" in said) == (road == "dpo")
    assert form.fields["batch_size"].widget.value == str(settings.batch_size)


def test_a_profile_shows_what_it_sets_at_once():
    form = open_form("dpo")
    form.fields["profile"].widget.value = "a100"
    assert form.fields["max_length"].widget.value == 1024 and form.settings().precision == "bfloat16"


def test_typing_in_an_older_view_counts_and_shows_in_the_newest():
    old, new = open_form("sft"), open_form("sft")
    old.fields["seed"].widget.value = 7
    assert new.fields["seed"].widget.value == 7 and new.settings().seed == 7


def test_the_demo_model_shows_its_defaults_at_once():
    form = open_form("sft")
    form.fields["model"].widget.value = "demo"
    assert form.fields["max_steps"].widget.value == 150 and form.settings() == SFTSettings(model="demo")


def test_the_first_run_all_stops_at_the_form_when_its_switch_says_so_and_only_that_one(watched):
    form = open_form("sft", "stop")
    with pytest.raises(Paused):
        form.settings()
    assert open_form("sft", "stop").settings() == SFTSettings()


def test_headless_nothing_waits_for_anyone(capsys):
    form = open_form("sft", "stop")
    form._ipython_display_()
    assert form.settings() == SFTSettings() and form.token is None and "nobody is watching" in capsys.readouterr().out


def test_headless_it_is_said_where_the_settings_come_from_and_where_to_correct_them(monkeypatch, capsys):
    open_form("sft")._ipython_display_()
    assert "so the settings are the defaults\n" in capsys.readouterr().out
    monkeypatch.setattr(forms, "_stores", {})
    monkeypatch.setenv("AUTOSLOTH_MAX_STEPS", "x")
    monkeypatch.setenv("AUTOSLOTH_SEED", "2")
    form = open_form("sft")
    form._ipython_display_()
    said = capsys.readouterr().out
    assert "those of AUTOSLOTH_MAX_STEPS, AUTOSLOTH_SEED, and the defaults" in said and ".yaml" not in said
    with pytest.raises(SettingsError) as error:
        form.settings()
    assert error.value.todo == "Correct AUTOSLOTH_MAX_STEPS and run it again."
    Path("AutoSloth-SFT.yaml").write_text("repo: mine\n")
    monkeypatch.setattr(forms, "_stores", {})
    open_form("sft")._ipython_display_()
    assert "AUTOSLOTH_SEED, AutoSloth-SFT.yaml, and the defaults" in capsys.readouterr().out


def test_environment_over_file_in_the_form_too(monkeypatch):
    Path("AutoSloth-SFT.yaml").write_text("seed: 1\nrepo: mine\n")
    monkeypatch.setenv("AUTOSLOTH_SEED", "2")
    form = open_form("sft")
    assert form.fields["seed"].widget.value == 2 and form.fields["repo"].widget.value == "mine"


def test_an_uploaded_dataset_is_kept_as_a_file_and_not_in_the_widget():
    form = open_form("sft")
    upload(form.fields["dataset"].upload, "../mine.jsonl", b'{"text": "MARKED"}\n')
    kept = Path(form.settings().dataset)
    assert kept == Path.cwd() / "uploads" / "mine.jsonl" and kept.read_bytes() == b'{"text": "MARKED"}\n'
    assert form.fields["dataset"].widget.value == str(kept) and "MARKED" not in state_of_all_widgets()
    assert "8 MB" in form.fields["dataset"].row.children[1].children[-1].value


def test_a_settings_file_is_taken_over_and_what_is_wrong_in_it_is_said():
    form = open_form("sft")
    form.fields["seed"].widget.value = 7
    upload(form.load, "other.yaml", b"repo: theirs\nbatch_size: 0\nnonsense: 1\n")
    assert form.settings() == SFTSettings(repo="theirs")
    assert "batch_size is 0" in form.summary.value and "nonsense" in form.summary.value
    upload(form.load, "photo.png", b"\x89PNG\xff")
    assert form.settings() == SFTSettings(repo="theirs") and "photo.png is no settings file" in form.summary.value


def test_the_form_shows_its_file_and_the_command_that_takes_it():
    form = open_form("sft")
    form.fields["repo"].widget.value = "mine"
    assert "<code>autosloth sft AutoSloth-SFT.yaml</code>" in form.file.value and "repo: mine" in form.file.value


def test_what_is_typed_is_never_taken_for_html():
    form = open_form("sft")
    form.fields["repo"].widget.value = "<b>x</b>"
    assert "<b>x" not in form.file.value + form.summary.value + form.fields["repo"].message.value


def test_a_typed_token_is_used_and_is_in_no_widget_and_no_file(watched, capsys):
    form = open_form("sft")
    assert isinstance(form.token, ipywidgets.Password)
    form.token.value = f" {TOKEN}\n"
    form.fields["publish_to_hub"].widget.value = True
    form.settings()
    from huggingface_hub import get_token

    assert get_token() == os.environ["HF_TOKEN"] == TOKEN and form.token.value == ""
    assert TOKEN not in state_of_all_widgets() + repr(forms.__dict__) + repr(runtime.__dict__) + capsys.readouterr().out
    assert not [path for path in Path.cwd().rglob("*") if path.is_file() and TOKEN in path.read_text()]
    assert "from the form" in open_form("sft").token.value


def test_a_token_that_is_there_is_not_asked_for(watched, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "from the environment" in open_form("sft").token.value and TOKEN not in state_of_all_widgets()


def test_settings_move_to_drive_once_it_is_mounted_unless_newer_ones_are_there(tmp_path, monkeypatch):
    drive = tmp_path / "drive" / "MyDrive" / "AutoSloth"
    form = open_form("sft")
    form.fields["seed"].widget.value = 7
    monkeypatch.setattr(forms, "drive_folder", lambda: drive)
    assert open_form("sft").settings().seed == 7
    assert (drive / "AutoSloth-SFT.yaml").is_file() and not Path("AutoSloth-SFT.yaml").exists()
    Path("AutoSloth-SFT.yaml").write_text("seed: 1\n")
    os.utime("AutoSloth-SFT.yaml", (0, 0))
    forms._stores.clear()
    assert open_form("sft").settings().seed == 7


def test_importing_the_form_takes_no_heavy_library():
    import subprocess

    code = "import sys, autosloth.form.form; print([name for name in ('torch', 'transformers', 'datasets', 'unsloth') if name in sys.modules])"
    root = str(Path(forms.__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert result.stdout.strip() == "[]", result.stderr


# --- In a kernel of this release, cell by cell as the notebooks have it.


def executed(tmp_path, *cells, widget_state=True):
    """Run cells headless in a kernel of this environment; the notebook as it is saved, and what was printed."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = NotebookClient(
        notebook, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}, **AT_ANY_SPEED
    )
    client.store_widget_state = widget_state
    client.execute()
    nbformat.write(notebook, tmp_path / f"saved-{widget_state}.ipynb")
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.outputs)


ROOT = Path(forms.__file__).parents[2]
CELLS = [
    "".join(cell["source"]) for cell in json.loads((ROOT / "notebooks" / "AutoSloth-SFT.ipynb").read_text())["cells"]
]
FORM = next(cell for cell in CELLS if "# @title The form" in cell)
GATE = "settings = form.settings()\nprint('RESULT', settings.max_steps)"


def test_the_notebooks_own_cells_run_headless_also_with_the_switch_at_stop(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("AUTOSLOTH_MAX_STEPS", "7")
    stop = FORM.replace('first_run_all = "go"', 'first_run_all = "stop"')
    assert stop != FORM and "RESULT 7" in executed(tmp_path, stop, GATE)


@pytest.mark.parametrize("widget_state", [True, False])
def test_a_token_typed_into_a_kernels_form_is_in_no_saved_notebook(tmp_path, monkeypatch, widget_state):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    watched = "import autosloth.form.form\nautosloth.form.form.front_end_attached = lambda: True"
    typed = "import os\nform.token.value = 'hf_MARKED' + 'markedMARKED'\nprint('TAKEN', len(os.environ['HF_TOKEN']))"
    said = executed(tmp_path, watched, FORM, typed, GATE, "form.settings()", widget_state=widget_state)
    assert f"TAKEN {len(TOKEN)}" in said and "RESULT 60" in said
    saved = (tmp_path / f"saved-{widget_state}.ipynb").read_text()
    assert ("application/vnd.jupyter.widget-state+json" in saved) == widget_state
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN in path.read_text(errors="replace")]


def test_what_is_known_of_the_chosen_model_stands_below_it_and_folded_the_same_of_each_suggestion():
    field = open_form("dpo").fields["model"]
    assert field.row.children[1] is field.word and set(field.widget.options) == set(field.words)
    assert ">7.2B; fits a T4 in 4 bit · all suggestions</summary>" in field.word.value
    field.widget.value = "unsloth/phi-4-unsloth-bnb-4bit"
    assert ">14.7B; fits an A100 in 4 bit · all suggestions</summary>" in field.word.value
    field.widget.value = "me/base"
    assert ">all suggestions</summary>" in field.word.value
    for name, word in field.words.items():
        assert f"<code>{name}</code></td><td>{word}</td>" in field.word.value
    assert open_form("sft").fields["dataset"].words == {}
