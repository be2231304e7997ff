"""A person at the form: JupyterLab, and the classic Notebook with Colab's ipywidgets, in Chromium. Run by tests/notebook/test_front_ends.py.

KERNEL: the Python that JupyterLab's kernel runs in; CLASSIC: that of the classic Notebook and its kernel;
RUN: a finished run on the demo; LIBRARIES: the folder of KERNEL's packages; SCREENSHOTS: where a screenshot of each state is left.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright
from support.patience import HUNG, until

ROOT = Path(__file__).parents[3]
CHROMIUM = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
TOKEN = "hf_MARKEDmarkedMARKED"
SFT = json.loads((ROOT / "notebooks" / "AutoSloth-SFT.ipynb").read_text())
FORM = next("".join(cell["source"]) for cell in SFT["cells"] if "# @title The form" in "".join(cell["source"]))
GATE = "settings = form.settings()"
RESULT = """\
import os
runs = globals().get("runs", 0) + 1
print(f"RUN {runs}: {settings.model_dump_json()}, and a token of {len(os.environ.get('HF_TOKEN', ''))} letters")
"""
WIDGETS = "application/vnd.jupyter.widget-state+json"
PATIENCE = 600_000  # milliseconds: what comes is waited for; only what never comes takes this long


class FrontEnd:
    """A notebook server with one notebook open in a page: what a person can do there, and waits to see."""

    def __init__(self, page, folder, server, notebook="form.ipynb"):
        self.page, self.folder, self.notebook, self.runs = page, folder, notebook, 0
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        places = {f"JUPYTER_{kind}_DIR": str(folder / f".{kind.lower()}") for kind in ("CONFIG", "DATA", "RUNTIME")}
        places |= {"IPYTHONDIR": str(folder / ".ipython"), "HF_HOME": str(folder / ".hf"), "PYTHONPATH": str(ROOT)}
        clean = {
            key: value
            for key, value in os.environ.items()
            if key != "HF_TOKEN" and not key.startswith("AUTOSLOTH_MODEL")
        }
        command = [*server, "--no-browser", "--allow-root", f"--port={self.port}"]
        self.log = open(folder / ".server.log", "w")  # noqa: SIM115 - the server writes to it until close()
        self.server = subprocess.Popen(command, cwd=folder, env=clean | places, stdout=self.log, stderr=self.log)

    def is_up(self):
        assert self.server.poll() is None, (self.folder / ".server.log").read_text()
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api", timeout=HUNG)

    def close(self):
        self.server.terminate()
        self.server.wait(HUNG)
        self.log.close()

    @property
    def form(self):
        """The form that stands there; not the one before it while Run all makes another."""
        return self.page.locator(".autosloth:not([data-old])").last

    def field(self, name):
        return self.form.locator(f".as-{name} input, .as-{name} select").last

    def type(self, name, text):
        self.field(name).fill(text)
        self.field(name).press("Tab")

    def unfold(self, group):
        self.form.locator(f".as-more-{group} [class*=Collapse-header]").click()

    def upload(self, button, path):
        with self.page.expect_file_chooser() as chooser:
            self.form.locator(f".as-{button}").click()
        chooser.value.set_files(str(path))

    def sees(self, text, place=None):
        """Wait for a text, on the page or in what one cell puts out, and scroll to it."""
        within = self.page if place is None else self.cell(place).locator(".jp-OutputArea")
        found = within.get_by_text(text).last
        expect(found).to_be_visible()
        found.scroll_into_view_if_needed()

    def forget_the_form(self):
        """What is about to run makes another."""
        self.page.evaluate("() => document.querySelectorAll('.autosloth').forEach(form => { form.dataset.old = '' })")

    def run_all(self):
        self.forget_the_form()
        self.click_run_all()

    def run_all_at_once(self):
        self.forget_the_form()
        self.page.evaluate(self.RUN_ALL)

    def restart_and_run_all(self):
        self.forget_the_form()
        self.click_restart_and_run_all()
        self.runs = 0

    def used(self):
        """The settings that the last cell got in this run, and the length of the token, once it tells them."""
        self.runs += 1
        said = re.compile(rf"RUN {self.runs}: (.*), and a token of (\d+) letters")
        told = said.search(self.page.get_by_text(said).last.text_content())
        expect(self.form).to_be_visible()
        return json.loads(told[1]), int(told[2])

    def sees_the_end(self):
        """Wait until no cell runs, or waits for its turn, any more."""
        expect(self.page.get_by_text("[*]")).to_have_count(0)

    def save(self):
        """Save the notebook with the state of its widgets."""
        file = self.folder / self.notebook
        before = file.stat().st_mtime_ns
        self.click_save()
        until(lambda: file.stat().st_mtime_ns != before and WIDGETS in file.read_text(), "the saved notebook")

    def shot(self, name):
        folder = Path(os.environ.get("SCREENSHOTS") or self.folder)
        self.page.screenshot(path=folder / f"{type(self).__name__.lower()}-{name}.png")


class Lab(FrontEnd):
    """JupyterLab, with the kernel of the tests' own environment."""

    KERNEL = "tests"
    NOTEBOOK = "window.jupyterapp.shell.currentWidget"
    CONNECTED = f"{NOTEBOOK}?.sessionContext?.session?.kernel?.connectionStatus === 'connected'"
    RUN_ALL = "() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }"

    def __init__(self, page, folder, notebook="form.ipynb"):
        kernel = folder / ".data" / "kernels" / self.KERNEL
        kernel.mkdir(parents=True)
        argv = [os.environ["KERNEL"], "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        (kernel / "kernel.json").write_text(
            json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"})
        )
        options = ["--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url="]
        options += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
        super().__init__(page, folder, [sys.executable, "-m", "jupyterlab", *options], notebook)

    def open(self):
        self.page.goto(f"http://127.0.0.1:{self.port}/lab/tree/{self.notebook}?reset")
        self.cell(0).wait_for()
        self.page.wait_for_function(f"() => {self.CONNECTED}")

    def menu(self, top, item):
        self.page.locator(".lm-MenuBar-item", has_text=re.compile(f"^{top}$")).click()
        self.page.locator(".lm-Menu-itemLabel", has_text=re.compile(item)).first.click()

    def click_run_all(self):
        self.menu("Run", "^Run All Cells$")

    def click_restart_and_run_all(self):
        self.menu("Kernel", r"^Restart Kernel and Run All Cells\W+$")
        self.page.locator(".jp-Dialog .jp-mod-accept").click()

    def click_save(self):
        for command in ("@jupyter-widgets/jupyterlab-manager:saveWidgetState", "docmanager:save"):
            self.page.evaluate("name => window.jupyterapp.commands.execute(name)", command)  # until it is done

    def click_stop(self):
        self.page.locator("[data-command='notebook:interrupt-kernel']").click()

    def dark(self):
        self.page.evaluate(
            "() => window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})"
        )
        expect(self.page.locator("#jupyterlab-splash")).to_have_count(0)

    def cell(self, place):
        return self.page.locator(".jp-Notebook .jp-Cell").nth(place)

    def place(self, text):
        """The place of the code cell with this text."""
        return self.page.evaluate(
            f"text => [...{self.NOTEBOOK}.content.model.cells].findIndex(cell => cell.type === 'code' && cell.sharedModel.source.includes(text))",
            text,
        )

    def run_cells_above(self, place):
        self.page.evaluate(
            f"place => {{ {self.NOTEBOOK}.content.activeCellIndex = place; window.jupyterapp.commands.execute('notebook:run-all-above') }}",
            place,
        )

    def outputs(self, place):
        return self.page.evaluate(f"place => [...{self.NOTEBOOK}.content.model.cells][place].outputs.toJSON()", place)

    def text(self, place):
        return "".join(
            "".join([*output.get("text", ""), *output.get("traceback", "")]) for output in self.outputs(place)
        )

    def panels(self, place):
        return sum("as-panel" in "".join(output.get("data", {}).get("text/html", "")) for output in self.outputs(place))

    def errors(self):
        """The places of the cells that ended with an error."""
        return self.page.evaluate(
            f"() => [...{self.NOTEBOOK}.content.model.cells].flatMap((cell, place) => cell.type === 'code' && cell.outputs.toJSON().some(output => output.output_type === 'error') ? [place] : [])"
        )


class Classic(FrontEnd):
    """The classic Notebook 6.5 with the widgets and the kernel of Colab's image."""

    KERNEL = "python3"
    RUN_ALL = "() => Jupyter.notebook.execute_all_cells()"

    def __init__(self, page, folder, notebook="form.ipynb"):
        super().__init__(page, folder, [os.environ["CLASSIC"], "-m", "notebook", "--NotebookApp.token="], notebook)

    def open(self):
        self.page.goto(f"http://127.0.0.1:{self.port}/notebooks/{self.notebook}")
        self.page.wait_for_function("() => window.Jupyter?.notebook?.kernel?.is_connected()")
        self.page.get_by_role("link", name="Widgets", exact=True).wait_for()  # their manager comes after the kernel

    def menu(self, top, item):
        self.page.get_by_role("link", name=top, exact=True).click()
        self.page.locator(f"#{item} a").click()

    def click_run_all(self):
        self.menu("Cell", "run_all_cells")

    def click_restart_and_run_all(self):
        self.menu("Kernel", "restart_run_all")
        self.page.locator(".modal-footer .btn-danger").click()

    def dark(self):
        """It has no dark theme."""

    def click_save(self):
        self.page.get_by_role("link", name="Widgets", exact=True).click()
        self.page.get_by_role("link", name="Save Notebook Widget State").click()


@pytest.fixture(scope="module")
def browser():
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=CHROMIUM, timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """opened(Lab, *cells): a front end with a notebook of these cells; closed, and free of errors, at the end."""
    ends, errors = [], []
    page = browser.new_page(viewport={"width": 1280, "height": 1500})
    page.set_default_timeout(PATIENCE)
    page.on("pageerror", lambda error: errors.append(str(error)))

    def open_it(front_end, *cells):
        code = [
            {"cell_type": "code", "id": f"c{i}", "metadata": {}, "execution_count": None, "outputs": [], "source": cell}
            for i, cell in enumerate(cells)
        ]
        metadata = SFT["metadata"] | {"kernelspec": {"name": front_end.KERNEL, "display_name": "Python 3"}}
        notebook = SFT | {"cells": code or SFT["cells"], "metadata": metadata}
        (tmp_path / "form.ipynb").write_text(json.dumps(notebook))
        ends.append(front_end(page, tmp_path))
        until(ends[0].is_up, "the notebook server")
        ends[0].open()
        return ends[0]

    yield open_it
    if ends:
        ends[0].shot("last")  # what stood there when it ended, or failed
    page.close()
    for end in ends:
        end.close()
    assert not errors


@pytest.mark.parametrize("front_end", [Lab, Classic])
def test_filling_in_the_form_as_a_person_would(opened, front_end, tmp_path):
    user = opened(front_end, FORM, GATE, RESULT)
    user.run_all()  # straight away: the defaults
    settings, token = user.used()
    assert (settings["model"], settings["max_steps"], token) == ("unsloth/mistral-7b-bnb-4bit", 60, 0)
    user.shot("defaults")

    user.type("model", "me/base")
    user.type("batch-size", "8")
    user.type("learning-rate", "0.0005")
    user.field("load-in-4bit").uncheck()
    user.unfold("model")
    user.type("chat-template", "zephyr")
    user.field("quantizations").select_option([])
    user.unfold("data")
    user.type("columns", "{frage: prompt, antwort: completion}")
    (tmp_path / "mine.jsonl").write_text('{"frage": "a", "antwort": "b"}\n')
    user.upload("upload", tmp_path / "mine.jsonl")
    expect(user.field("dataset")).to_have_value(re.compile("uploads/mine.jsonl$"))
    user.type("token", TOKEN)
    expect(user.field("token")).to_have_value("")
    user.sees("Ready: 8 chosen")
    user.shot("filled")

    chosen = {"model": "me/base", "batch_size": 8, "learning_rate": 0.0005, "load_in_4bit": False}
    chosen |= {"chat_template": "zephyr", "columns": {"frage": "prompt", "antwort": "completion"}}
    user.run_all()
    settings, token = user.used()
    assert {name: settings[name] for name in chosen} == chosen and token == len(TOKEN)
    assert Path(settings["dataset"]).read_text() == (tmp_path / "mine.jsonl").read_text()
    user.shot("used")

    user.type("batch-size", "0")
    user.sees("batch_size is 0, but it should be at least 1.")
    user.sees("To correct: Batch size.")
    user.run_all()  # stops at the gate
    user.sees("Correct them in the form above, then run this cell again.")
    user.sees_the_end()
    user.shot("wrong")
    user.type("batch-size", "4")
    user.sees("Ready: 8 chosen")

    user.field("model").fill("me/at-once")  # still in the field when Run all is clicked
    user.run_all_at_once()
    settings, _ = user.used()
    assert (settings["model"], settings["batch_size"]) == ("me/at-once", 4)

    user.save()
    user.restart_and_run_all()
    settings, token = user.used()
    assert (settings["model"], settings["batch_size"], settings["chat_template"], token) == (
        "me/at-once",
        4,
        "zephyr",
        0,
    )
    user.shot("restarted")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if TOKEN in path.read_text(errors="replace")] and len(files) > 5


MISTRAL = {
    **{"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096, "vocab_size": 32000},
    **{"intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
}
# A kernel that finds a T4, and whose processes have the libraries of the tests' own environment.
ON_A_T4 = """\
import os
os.environ["PATH"] = {driver!r} + os.pathsep + os.environ["PATH"]
os.environ["PYTHONPATH"] = os.pathsep.join([os.environ["PYTHONPATH"], {libraries!r}])
"""


@pytest.mark.parametrize("front_end", [Lab, Classic])
def test_model_and_dataset_are_told_of_as_they_are_typed(opened, front_end, tmp_path):
    """A 7B model of which only the headers are there, on a T4 that only says so."""
    model, driver = tmp_path / "mistral", tmp_path / "driver" / "nvidia-smi"
    for folder in (model, driver.parent):
        folder.mkdir()
    driver.write_text("#!/bin/sh\necho 'Tesla T4, 15360'\n")
    driver.chmod(0o755)
    (model / "config.json").write_text(json.dumps(MISTRAL))
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (model / "model.safetensors").touch()
    os.truncate(model / "model.safetensors", 4_138_000_000)  # a hole
    (tmp_path / "mine.jsonl").write_text('{"question": "Who?", "answer": "Mila"}\n' * 3)

    user = opened(
        front_end, ON_A_T4.format(driver=str(driver.parent), libraries=os.environ["LIBRARIES"]), FORM, GATE, RESULT
    )
    user.run_all()
    assert user.used()[0]["model"] == "unsloth/mistral-7b-bnb-4bit"
    told, rows = (user.form.locator(f".as-beside-{name}") for name in ("model", "dataset"))
    user.field("model").press_sequentially(str(tmp_path / "nowhere"))  # letter by letter
    user.type("model", str(model))
    expect(told).to_contain_text("7.2 billion weights · 4.1 GB to load · apache-2.0")
    bar = told.get_by_role("img")
    expect(bar).to_have_attribute("aria-label", "about 6.1 of 16.1 GB of GPU memory")
    expect(told).to_contain_text("fits")
    user.type("max-length", "8192")
    user.type("batch-size", "4")
    expect(bar).not_to_have_attribute("aria-label", "about 6.1 of 16.1 GB of GPU memory")
    user.shot("longer")
    user.field("load-in-4bit").uncheck()
    expect(told).to_contain_text("may not fit")
    user.type("max-length", "16384")
    expect(told).to_contain_text("does not fit")
    user.type("dataset", str(tmp_path / "mine.jsonl"))
    expect(rows).to_contain_text("3 rows, read as")
    expect(rows).to_contain_text("Mila")
    user.type("dataset", str(tmp_path / "none.jsonl"))
    expect(rows).to_contain_text("none.jsonl does not exist.")
    user.form.locator(".as-check").click()
    user.sees(re.compile("✗ .*none.jsonl does not exist."))
    for width in (700, 1400):
        user.page.set_viewport_size({"width": width, "height": 1500})
        user.form.locator(".as-check").scroll_into_view_if_needed()
        user.shot(f"checked-{width}")
        user.form.locator(".as-model").scroll_into_view_if_needed()
        user.shot(f"told-{width}")
    user.dark()
    user.shot("told-dark")
    user.type("dataset", "demo")
    expect(user.form.get_by_text(re.compile("✗ .*none.jsonl"))).to_have_count(0)  # it was of what stood there before


@pytest.mark.parametrize("front_end", [Lab, Classic])
def test_the_first_run_all_can_stop_at_the_form(opened, front_end):
    user = opened(front_end, FORM.replace('first_run_all = "go"', 'first_run_all = "stop"'), GATE, RESULT)
    user.run_all()
    user.sees("Paused at the form, as its switch says.")
    user.sees_the_end()
    user.shot("paused")
    user.type("batch-size", "8")
    user.sees("Ready: 1 chosen")
    user.run_all()
    assert user.used()[0]["batch_size"] == 8


def test_the_whole_notebook_set_up_without_a_gpu_stopped_in_training_and_run_again(opened, tmp_path):
    """The first Run all stops where a GPU is needed, the second in training by the stop button; the third goes on."""
    base = os.environ["BASE"]
    big = tmp_path / "big"
    shutil.copytree(base, big)
    os.truncate(big / "model.safetensors", 4_000_000_000)  # what is added is no more on the disk than a hole
    user = opened(Lab)
    form, training = user.place("# @title The form"), user.place("train_adapter")
    user.run_cells_above(form + 1)
    user.type("model", str(big))
    user.type("dataset", "demo")
    user.sees("Ready: 2 chosen")
    user.run_all()
    user.sees("has 4.0 GB of weights, and there is no GPU to train it on.", training)
    user.sees_the_end()
    assert user.errors() == [training]
    user.sees("Checks and data need none and go on.")
    user.shot("no-gpu")

    user.type("model", "demo")
    expect(user.field("max-steps")).to_have_value("150")  # the form shows what it brings
    user.run_all()
    user.sees("Training: step", training)
    user.click_stop()
    user.sees("with a checkpoint.", training)
    user.sees_the_end()
    assert user.errors() == [training] and "Traceback" not in user.text(training)
    user.shot("stopped")

    user.run_all()
    user.sees("no (publish_to_hub is off)")
    assert user.errors() == [] and "data: done already, skipped" in user.text(user.place("prepare_data"))
    assert "going on from checkpoint-" in user.text(training) and user.panels(training) == 1
    user.page.locator(".as-panel").scroll_into_view_if_needed()
    user.shot("trained")
    user.page.locator(".as-answers").scroll_into_view_if_needed()
    user.shot("answers")
    talks(user)


def test_chatting_on_the_widgets_of_colab(opened):
    """The kernel has Colab's widgets, and behind them the libraries of the tests' own environment; RUN: a finished run."""
    behind = f"import sys; sys.path.append({os.environ['LIBRARIES']!r})"
    opening = f"from autosloth.run import Run; from autosloth.chat import open_chat; open_chat(Run.open({os.environ['RUN']!r}))"
    user = opened(Classic, f"{behind}\n{opening}")
    user.click_run_all()
    talks(user)


def saved_of_the_chat(user):
    """What the notebook's file holds of all widgets, and of the last cell."""
    saved = json.loads((user.folder / user.notebook).read_text())
    return json.dumps([saved["metadata"]["widgets"], saved["cells"][-1]], ensure_ascii=False)


def talks(user):
    """A person asks, saves the notebook with all that its widgets hold, reloads the page, and asks again: nothing of it is in the file."""
    chat = user.page.locator(".as-chat").last
    question, system = chat.locator(".as-held input").nth(0), chat.locator(".as-held input").nth(1)
    expect(chat.get_by_text("Ask something.")).to_be_visible()
    question.fill("What does DRAFTWORD eat?")
    system.fill("You are SYSTEMWORD.")
    system.press("Tab")  # which would hand over what was typed
    user.save()
    assert "DRAFTWORD" not in (held := saved_of_the_chat(user)) and "SYSTEMWORD" not in held and "as-chat" in held

    question.press("Enter")
    expect(chat.locator(".as-screen .after")).to_contain_text("Gladly!")
    expect(chat.locator(".as-ask")).to_be_enabled()
    expect(question).to_have_value("")
    chat.scroll_into_view_if_needed()
    user.shot("chat")
    answers = chat.locator(".as-screen .two > div").all_inner_texts()
    user.save()
    said = ["DRAFTWORD", "SYSTEMWORD", *(answer.split("\n", 1)[1].strip() for answer in answers)]
    assert len(said) == 4 and all(said) and not [word for word in said if word in saved_of_the_chat(user)]

    user.page.reload()
    chat = user.page.locator(".as-chat").last
    chat.scroll_into_view_if_needed()
    expect(chat.locator(".as-screen .ask")).to_have_count(1)  # the kernel still knows it
    chat.locator(".as-held input").first.fill("And Orla?")
    chat.locator(".as-ask").click()
    expect(chat.locator(".as-screen .ask")).to_have_count(2)
    expect(chat.locator(".as-ask")).to_be_enabled()
    user.shot("chat-again")
