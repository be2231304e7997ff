"""What is told beside model and dataset while they are typed, by the processes that find it out."""

import json
import os
import queue
import shutil
import subprocess
import threading
from unittest import mock

import pytest
from support.hub_server import HubServer
from support.patience import HUNG, until

from autosloth.child_process import Ended, run_apart
from autosloth.form import beside, glance
from autosloth.form import form as forms
from autosloth.form.form import open_form
from autosloth.hardware import GPU
from autosloth.settings import DPOSettings, SFTSettings, SPINSettings

T4 = GPU("Tesla T4", 16.1)
MISTRAL = {
    **{"numbers": 7241465856, "active": None, "gb": 4.138, "license": "apache-2.0", "gated": None, "on_hub": True},
    **{"shape": [4096, 14336, 32, 4096, 1024, 32000, False, [], 0], "counts": None, "rank": None},
}
# The answer of `main` about one dataset comes at once, that about another never.
TWO_SPEEDS = """
import os, pathlib, threading
def main(request):
    name = request["values"]["dataset"]
    pathlib.Path(os.environ["BEGUN"], name).touch()
    if name == "slow":
        threading.Event().wait()
    return {"name": name}
"""


@pytest.fixture
def looked_up(monkeypatch):
    """Nobody waits for more letters, and nothing is known of earlier tests."""
    monkeypatch.setattr(glance, "PAUSE", 0)
    monkeypatch.setattr(glance, "_known", {})


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A kernel just started, in a folder of its own, with someone in front of it, on a T4."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(forms, "_stores", {})
    monkeypatch.setattr(forms, "front_end_attached", lambda: True)
    monkeypatch.setattr(forms, "gpu_at_hand", lambda: T4)


def apart(module, settings, env=os.environ):
    """The answer of a module's `main` about settings, with this environment."""
    with mock.patch.dict(os.environ, env, clear=True):
        request = {"road": settings.road, "values": settings.model_dump()}
        ended = run_apart(module, request, online=True, bare=False)
    assert not ended.status, ended.errors
    return ended.answer


def test_the_next_letter_ends_what_is_asked_and_only_the_last_answer_is_told(looked_up, tmp_path, monkeypatch):
    (tmp_path / "two_speeds.py").write_text(TWO_SPEEDS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("BEGUN", str(tmp_path))
    told, started = queue.Queue(), []
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **how: started.append(real(*given, **how)) or started[-1])
    look = glance.Glance("two_speeds", ("dataset",), told.put)
    look.follow(SFTSettings(dataset="slow"))
    until((tmp_path / "slow").exists, "the first process")
    look.follow(SFTSettings(dataset="quick"))
    look.follow(SFTSettings(dataset="quick", seed=1))  # nothing that it depends on
    assert [told.get(timeout=HUNG) for _ in range(3)] == [None, None, {"name": "quick"}]
    assert started[0].wait(HUNG) != 0 and len(started) == 2 and told.empty()


@pytest.mark.parametrize(
    "settings, answer, known",
    [
        ({"model": "team/base"}, {"gb": 1.0}, True),
        ({"model": "team/base"}, {}, False),  # the Hub was not reached
        ({"model": "team/base"}, {"problem": "It is gated."}, False),
        ({"model": "/a/folder"}, {"gb": 1.0}, False),
        ({"dataset": "team/rows"}, {"parts": [{"rows": 3}]}, True),
        ({"dataset": [{"path": "team/rows"}, {"path": "rows.jsonl"}]}, {"parts": [{"rows": 3}, {"rows": 3}]}, False),
        ({"dataset": [{"path": "team/rows"}, {"path": "team/more"}]}, {"parts": [{"rows": 3}, {"problem": "No."}]}, False),
    ],
)  # fmt: skip
def test_the_next_form_knows_what_was_told_of_the_hub_and_asks_again_about_all_else(
    looked_up, monkeypatch, settings, answer, known
):
    """An uploaded file may be another by then, and what was refused may be allowed."""
    asked, told = [], queue.Queue()
    monkeypatch.setattr(glance, "run_apart", lambda module, *given, **how: asked.append(module) or Ended(0, answer, ""))
    for _ in range(2):
        look = glance.Glance("autosloth.models.glance", ("model", "dataset"), told.put)
        look.follow(SFTSettings(**settings))
        while told.get(timeout=HUNG) != answer:
            pass
    assert len(asked) == (1 if known else 2)


def test_of_a_model_in_a_folder_size_licence_and_shape_are_told(base):
    told = apart("autosloth.models.glance", SFTSettings(model=str(base)))
    assert told["numbers"] > 1e6 and told["gb"] > 0 and told["rank"] is None and told["shape"][5] == 2048, told
    assert apart("autosloth.models.glance", SFTSettings(model="/nowhere")) == {
        "problem": "The model folder /nowhere does not exist."
    }


def test_what_the_hub_tells_is_told_and_what_it_does_not_let_be_read_too(base, tmp_path):
    files = {path.name: path.read_bytes() for path in base.iterdir() if path.is_file()}
    files["README.md"] = b"---\nlicense: mit\n---\n"
    rows = "".join(json.dumps({"question": f"Who is {n}?", "answer": "Mila"}) + "\n" for n in range(30)).encode()
    with HubServer() as hub:
        hub.add_repo("model", "team/base", files)
        hub.add_repo("model", "team/gated", files, gated=True)
        hub.add_repo("dataset", "team/rows", {"train.jsonl": rows})
        env = {**os.environ, **hub.env(tmp_path)}
        told = apart("autosloth.models.glance", SFTSettings(model="team/base"), env)
        assert (told["license"], told["gated"], told["on_hub"]) == ("mit", None, True)
        gated = apart("autosloth.models.glance", SFTSettings(model="team/gated"), env)
        assert gated == {"problem": "The model team/gated is gated."}
        wrong = apart("autosloth.models.glance", SFTSettings(model="team/bse"), env)
        assert wrong == {"problem": "The model team/bse does not exist on the Hub, or is private."}
        (part,) = apart("autosloth.data.glance", SFTSettings(dataset="team/rows"), env)["parts"]
        assert part["read_as"].startswith("prompt") and part["first"] == [["user", "Who is 0?"], ["assistant", "Mila"]]
        assert part["rows"] is None  # its card tells no number
    env |= {"HF_HUB_OFFLINE": "1"}
    assert apart("autosloth.data.glance", SFTSettings(dataset="team/rows"), env) == {"parts": [{}]}


def test_of_files_rows_are_counted_and_of_several_datasets_each_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "Who?", "answer": "Mila"}\n' * 1001)
    (tmp_path / "b.csv").write_text("what;else\n1;2\n")
    several = [{"path": str(tmp_path / "a.jsonl")}, {"path": str(tmp_path / "b.csv")}, {"path": "demo"}]
    first, second, third = apart("autosloth.data.glance", SFTSettings(dataset=several))["parts"]
    assert (first["rows"], first["more"], first["first"]) == (1001, False, [["user", "Who?"], ["assistant", "Mila"]])
    assert "are not recognised: what, else." in second["problem"] and third["rows"] == 288
    html = beside.about_dataset({"parts": [first, second, {}]}, SFTSettings(dataset=several))
    assert "1,001 rows, read as" in html and "a.jsonl: " in html and "are not recognised" in html
    (pairs,) = apart("autosloth.data.glance", DPOSettings(dataset="demo"))["parts"]
    assert [name for name, _ in pairs["first"]] == ["prompt", "chosen", "rejected"]


@pytest.mark.parametrize("change", [{"batch_size": 4}, {"max_length": 4096}, {"lora_r": 256}, {"load_in_4bit": False}])
def test_the_bar_follows_what_memory_depends_on(change):
    before, after = (
        beside.about_memory(SFTSettings(**values), MISTRAL, T4)
        for values in ({"batch_size": 1}, {"batch_size": 1} | change)
    )
    assert "about 6.1 of 16.1 GB" in before and before != after and "<b style=" in after


def test_without_a_gpu_or_a_shape_less_is_told():
    assert "No GPU here; on one it takes about 6." in beside.about_memory(SFTSettings(), MISTRAL, None)
    counts = [7_000_000_000, 300_000_000, 2_600_000, 130_000_000, False, 100_000, None]
    html = beside.about_memory(SPINSettings(), {**MISTRAL, "shape": None, "counts": counts}, T4)
    assert "fits" in html and "at least" in html
    assert beside.about_memory(SFTSettings(), {**MISTRAL, "shape": None}, T4) == ""
    begun = beside.about_memory(
        SFTSettings(lora_r=8), {**MISTRAL, "rank": 256}, T4
    )  # by the adapter that it starts from
    assert begun == beside.about_memory(SFTSettings(lora_r=256), MISTRAL, T4)


def test_the_form_shows_what_is_told_and_the_bar_follows_at_once(kernel):
    form = open_form("sft")
    shown = form.fields["model"].beside
    assert shown.value == ""
    form.tell("model", MISTRAL)
    assert "7.2 billion weights · 4.1 GB to load · apache-2.0 · not gated" in shown.value and "fits" in shown.value
    before = shown.value
    form.fields["lora_r"].widget.value = 128
    assert shown.value != before
    form.fields["model"].widget.value = "demo"
    assert "tiny base" in shown.value
    form.tell("dataset", {"parts": [{"problem": "None there."}]})
    assert "None there." in form.fields["dataset"].beside.value
    form.tell("dataset", {})  # the process came to no answer
    assert form.fields["dataset"].beside.value == ""


def test_the_check_button_shows_problems_until_the_settings_change(kernel, monkeypatch):
    form, asked, go_on = open_form("sft"), [], threading.Event()

    def no_process(module, request, **how):
        asked.append((module, request["road"], request["values"]["model"]))
        go_on.wait(HUNG)
        return Ended(0, {"said": ["check: x"], "problems": [["<No> model.", "Choose one."]]}, "")

    monkeypatch.setattr(forms, "run_apart", no_process)
    form.fields["batch_size"].widget.value = "0"
    form.check_button.click()
    assert "Correct what is marked above first." in form.found.value and not asked
    form.fields["batch_size"].widget.value = "auto"
    form.check_button.click()
    assert form.check_button.disabled and "Checking" in form.found.value
    go_on.set()
    until(lambda: not form.check_button.disabled, "the check")
    until(lambda: "✗ &lt;No&gt; model." in form.found.value, "what it found")
    assert asked == [("autosloth.check", "sft", SFTSettings().model)] and "Choose one." in form.found.value
    form.fields["lora_r"].widget.value = 8
    assert form.found.value == ""
    assert "came to no end (its last words)" in forms.what_was_found(Ended(1, {}, "its last words"))


@pytest.mark.slow
def test_a_real_check_in_a_process_of_its_own(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    settings = SFTSettings(model=str(tmp_path / "base"), dataset="demo", load_in_4bit=False, storage=str(tmp_path))
    found = apart("autosloth.check", settings)
    assert found["problems"] == [] and any(line.startswith("check: no problem found") for line in found["said"])
    shown = forms.what_was_found(Ended(0, found, ""))
    assert "✓ No problem found." in shown
    (tmp_path / "base" / "tokenizer.json").unlink()
    (tmp_path / "base" / "tokenizer.model").unlink()
    assert apart("autosloth.check", settings)["problems"]


def test_nobody_is_asked_where_nobody_watches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(forms, "_stores", {})
    assert open_form("sft").glances == {}
