"""llama.cpp comes from one pinned source package: its converter, and llama-cpp-python where it is not installed yet."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.environments import environment, wheel
from support.patience import HUNG

from autosloth.check import check_architecture
from autosloth.errors import ExportError
from autosloth.export import llama
from autosloth.settings import SFTSettings

ROOT = Path(__file__).parents[2]


def test_the_converter_is_of_the_pinned_llama_cpp_python():
    pinned = (ROOT / "requirements-bare.txt").read_text().splitlines()
    assert f"llama-cpp-python=={llama.LLAMA_CPP_PYTHON}" in pinned and llama.BESIDE_IT in pinned
    folder = llama.fetch_converter()
    assert (folder / "convert_hf_to_gguf.py").is_file() and (folder / "convert_lora_to_gguf.py").is_file()
    assert (folder / "gguf-py" / "gguf" / "__init__.py").is_file()


def test_another_source_package_than_the_pinned_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOSLOTH_CACHE", str(tmp_path))
    monkeypatch.setattr(llama, "SOURCE_SHA256", "0" * 64)
    with pytest.raises(ExportError, match="could not be fetched"):
        llama.fetch_converter()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": ["Wrapper"], "text_config": {"architectures": ["Qwen2ForCausalLM"]}},
    ],
    ids=["plain", "in text_config"],
)
def test_an_architecture_that_the_converter_knows_is_let_pass(config):
    llama.refuse_unknown_architecture(config, "me/model")


@pytest.mark.parametrize("config", [{"architectures": ["SlothForCausalLM"]}, {}], ids=["unknown", "none named"])
def test_another_architecture_is_told_before_training_when_a_gguf_is_asked_for(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = SFTSettings(model=str(tmp_path))
    check_architecture(settings)  # without weights it is no model: `check_model` tells of that
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(ExportError, match=r"does not know its architecture .*Set `quantizations: \[\]`"):
        check_architecture(settings)
    check_architecture(settings.model_copy(update={"quantizations": []}))


def without_llama_cpp(tmp_path, code):
    """Run code in an environment that has no llama-cpp-python; pip finds what lies in tmp_path and installs it into tmp_path/site."""
    variables = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_TARGET": str(tmp_path / "site")}
    variables |= {"PYTHONPATH": f"{ROOT}:{tmp_path / 'site'}", "AUTOSLOTH_CACHE": str(tmp_path / "cache")}
    return subprocess.run([environment("kaggle"), "-c", code], env={**os.environ, **variables}, capture_output=True, text=True)  # fmt: skip


USE = """
import importlib.util
from autosloth.errors import ExportError
from autosloth.export.llama import compile_llama_cpp, llama_cpp
assert importlib.util.find_spec("llama_cpp") is None
compile_llama_cpp()
compile_llama_cpp()  # is under way already
print("MEANWHILE")
try:
    print(llama_cpp().MADE_OF)
except ExportError as error:
    print(error)
"""


@pytest.mark.slow
def test_where_it_is_missing_it_is_made_in_the_background_and_waited_for(tmp_path):
    wheel(tmp_path, "llama_cpp_python", llama.LLAMA_CPP_PYTHON, "llama_cpp")
    wheel(tmp_path, "diskcache", llama.BESIDE_IT.partition("==")[2], "diskcache")
    said = without_llama_cpp(tmp_path, USE)
    lines = said.stdout.splitlines()
    assert lines[-1] == "llama_cpp_python", said
    assert [line.partition(",")[0] for line in lines[:2]] == ["llama.cpp: compiling in the background", "MEANWHILE"]


def test_where_it_cannot_be_made_the_reason_and_the_way_on_are_said(tmp_path):
    said = without_llama_cpp(tmp_path, USE).stdout
    assert "could not be installed (ERROR: " in said and "llama-cpp-python.log" in said and "run again" in said


PIP = """
import subprocess
subprocess.run(["sh", "-c", "exec 3> {pipe}; echo here >&3; sleep 100000"])
"""
COMPILE = """
import importlib.util, threading
from autosloth.export import llama
importlib.util.find_spec = lambda name: None
llama.compile_llama_cpp()
threading.Event().wait()
"""


@pytest.mark.parametrize("deadly", [signal.SIGKILL, signal.SIGTERM])
def test_the_compiler_ends_with_the_process_that_started_it(tmp_path, deadly):
    (tmp_path / "pip.py").write_text(PIP.format(pipe=tmp_path / "pipe"))
    os.mkfifo(tmp_path / "pipe")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    given = os.environ | {"PYTHONPATH": paths, "AUTOSLOTH_CACHE": str(tmp_path / "cache")}
    parent = subprocess.Popen([sys.executable, "-c", COMPILE], env=given, stdout=subprocess.DEVNULL)
    with open(tmp_path / "pipe", "rb", buffering=0) as pipe:
        assert pipe.read(5) == b"here\n"
        parent.send_signal(deadly)
        assert select.select([pipe], [], [], HUNG)[0] and pipe.read() == b""  # nobody can write to it any more
    assert parent.wait() == -deadly


class Compiler:
    """A process that is not done yet when asked as often as there are logs; each time its log is the next of them."""

    def __init__(self, *logs):
        self.logs = iter(logs)

    def wait(self, seconds):
        if (log := next(self.logs, None)) is not None:
            llama.log_path().write_text(log)
            raise subprocess.TimeoutExpired("pip", seconds)


def test_while_it_is_waited_for_each_new_step_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AUTOSLOTH_CACHE", str(tmp_path))
    log = "Collecting llama-cpp-python\n  [1/83] /usr/bin/g++ -c a.cpp\n  warning: x[3/4] is odd\n"
    llama.watch(Compiler("Collecting", log, log, log + "  [2/83] g++ -c b.cpp\n"))
    assert capsys.readouterr().out == "llama.cpp: step 1 of 83\nllama.cpp: step 2 of 83\n"


def test_where_it_is_installed_nothing_is_started(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    llama.compile_llama_cpp()
    assert llama.llama_cpp().__version__ == llama.LLAMA_CPP_PYTHON
