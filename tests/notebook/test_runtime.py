"""Where a notebook runs: tokens and Drive, with a stand-in for google.colab and kaggle_secrets that fails in every way known of them."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from autosloth import check
from autosloth.errors import StorageError
from autosloth.hardware import gpu_name
from autosloth.notebook import runtime
from autosloth.settings import SFTSettings

TOKEN = "hf_MARKEDmarkedMARKED"


class SecretNotFoundError(Exception):
    pass


class NotebookAccessError(Exception):
    pass


class TimeoutException(Exception):
    pass


@pytest.fixture(autouse=True)
def nothing_known(tmp_path, monkeypatch):
    """No token anywhere, on a machine of nobody's."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(runtime, "_given", {})
    monkeypatch.setattr(runtime, "DRIVE", tmp_path / "drive")
    for name in ("HF_TOKEN", "COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.setenv(name, "")  # so that what a test puts there is taken back
        monkeypatch.delenv(name)


@pytest.fixture
def colab(monkeypatch):
    """Make this machine Colab's: colab(get=..., mount=...) with what its two calls do."""

    def make(get=None, mount=None, watched=True):
        package = types.ModuleType("google.colab")
        package.userdata, package.drive = (
            types.ModuleType("google.colab.userdata"),
            types.ModuleType("google.colab.drive"),
        )
        package.userdata.get, package.drive.mount = get, mount
        monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
        for module in (package, package.userdata, package.drive):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(runtime, "front_end_attached", lambda: watched)

    return make


@pytest.fixture
def kaggle(monkeypatch):
    """Make this machine Kaggle's, with what asking for a secret does."""

    def make(get):
        client = types.SimpleNamespace(get_secret=get)
        monkeypatch.setitem(sys.modules, "kaggle_secrets", types.SimpleNamespace(UserSecretsClient=lambda: client))
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")

    return make


def raising(error):
    def call(*_):
        raise error

    return call


def test_a_token_of_the_environment_comes_first(colab, monkeypatch):
    colab(get=raising(AssertionError("asked for")))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert runtime.find_token() == "the environment"


def test_colabs_secret_is_put_where_every_library_looks(colab):
    colab(get={"HF_TOKEN": TOKEN}.get)
    assert runtime.find_token() == "Colab's secrets" == runtime.find_token() and os.environ["HF_TOKEN"] == TOKEN
    assert TOKEN not in repr(runtime._given)


@pytest.mark.parametrize(
    "error", [NotebookAccessError(TOKEN), TimeoutException(TOKEN), Exception(TOKEN), ImportError()]
)
def test_a_colab_secret_that_cannot_be_read_is_said_and_the_next_place_asked(colab, error, capsys, tmp_path):
    colab(get=raising(error))
    (tmp_path / "token").write_text("hf_other")
    assert runtime.find_token() == "the saved login" and "HF_TOKEN" not in os.environ
    said = capsys.readouterr().out
    assert f"Colab's secret HF_TOKEN cannot be read ({type(error).__name__})" in said and TOKEN not in said


def test_no_such_colab_secret_is_no_news(colab, capsys):
    colab(get=raising(SecretNotFoundError("HF_TOKEN")))
    assert runtime.find_token() is None and capsys.readouterr().out == ""


@pytest.mark.parametrize("empty", [None, ""])
def test_an_empty_colab_secret_is_none(colab, empty):
    colab(get=lambda name: empty)
    assert runtime.find_token() is None


def test_colab_is_not_asked_where_nobody_could_answer(colab):
    colab(get=raising(AssertionError("asked for")), watched=False)
    assert runtime.find_token() is None


def test_kaggles_secret_is_taken(kaggle):
    kaggle({"HF_TOKEN": TOKEN}.get)
    assert runtime.find_token() == "Kaggle's secrets" and os.environ["HF_TOKEN"] == TOKEN


@pytest.mark.parametrize(
    "error", [ValueError(TOKEN), ConnectionError(), ImportError(), Exception("no user secrets exist")]
)
def test_a_kaggle_secret_that_is_not_given_is_said_and_the_next_place_asked(kaggle, error, capsys):
    kaggle(raising(error))
    assert runtime.find_token() is None
    said = capsys.readouterr().out
    assert f"hold no HF_TOKEN for this notebook ({type(error).__name__})" in said and TOKEN not in said


def mounts(folder):
    def mount(path):
        assert path == str(folder)
        (folder / "MyDrive").mkdir(parents=True)

    return mount


def test_drive_is_mounted_when_a_path_lies_on_it_and_once(colab, capsys):
    drive = runtime.DRIVE
    colab(mount=mounts(drive))
    runtime.mount_drive("runs")
    assert runtime.drive_folder() is None
    for _ in range(2):
        runtime.mount_drive(str(drive / "MyDrive" / "AutoSloth"))
    assert runtime.drive_folder() == drive / "MyDrive" / "AutoSloth" and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "error", [ValueError("mount failed"), Exception("credential propagation was unsuccessful"), ImportError("no")]
)
def test_a_refused_mount_is_said_and_check_refuses_the_path(colab, error, capsys, monkeypatch):
    colab(mount=raising(error))
    runtime.mount_drive(str(runtime.DRIVE / "MyDrive"))
    assert f"drive: not mounted ({type(error).__name__}: {error})" in capsys.readouterr().out
    monkeypatch.setattr(check, "DRIVE", runtime.DRIVE)
    with pytest.raises(StorageError, match="Google Drive is not mounted"):
        check.check_storage(SFTSettings(storage=str(runtime.DRIVE / "MyDrive" / "AutoSloth")))
    assert not runtime.DRIVE.exists()


def test_nobody_is_asked_for_leave_where_nobody_is(colab, capsys):
    colab(mount=raising(AssertionError("asked for")), watched=False)
    runtime.mount_drive(str(runtime.DRIVE / "MyDrive"))
    assert "not mounted, because nobody is there" in capsys.readouterr().out


def test_elsewhere_a_path_of_that_name_is_a_path():
    runtime.mount_drive(str(runtime.DRIVE / "MyDrive"))
    check.check_storage(SFTSettings(storage=str(runtime.DRIVE / "MyDrive")))


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("echo 'Tesla T4, 15360'", "Tesla T4 with 16.1 GB"),
        ("echo 'NVIDIA-SMI has failed'; exit 9", None),
        ("exit 0", None),
        ("echo 'NVIDIA A100, [N/A]'", None),
        (None, None),
    ],
)
def test_the_gpu_is_named_by_its_driver(tmp_path, monkeypatch, script, name):
    if script:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert gpu_name() == name


def test_without_a_kernel_nobody_watches():
    code = "from autosloth.notebook.runtime import front_end_attached; print(front_end_attached())"
    root = str(Path(runtime.__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert result.stdout == "False\n", result.stderr
