"""Where a notebook runs: whether a person is watching, and the secrets and Google Drive of Colab and Kaggle."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Literal

from pydantic import SecretStr

from ..output import say

DRIVE = Path("/content/drive")
TOKEN = "HF_TOKEN"  # its name in the environment and among the secrets

_given: dict[str, SecretStr] = {}  # where the token came from -> the token; of this process only


def front_end_attached() -> bool:
    """Whether a person can see and click: False under nbclient, nbmake and papermill, which allow no input, and without a kernel."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return bool(getattr(getattr(shell, "kernel", None), "_allow_stdin", False))


def place() -> Literal["colab", "kaggle", "elsewhere"]:
    """Whose machine this is."""
    if "COLAB_RELEASE_TAG" in os.environ or "google.colab" in sys.modules:
        return "colab"
    return "kaggle" if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else "elsewhere"


def find_token() -> str | None:
    """Where a Hugging Face token was found: environment, Colab's secrets, Kaggle's secrets or a saved login; None when there is none.

    One from the secrets is put into this process's environment, where every library looks first.
    """
    if os.environ.get(TOKEN):
        return next(iter(_given), "the environment")
    for source, look in (("Colab's secrets", colab_secret), ("Kaggle's secrets", kaggle_secret)):
        if token := look():
            give_token(token, source)
            return source
    from huggingface_hub import constants

    return "the saved login" if Path(constants.HF_TOKEN_PATH).is_file() else None


def give_token(token: str, source: str) -> None:
    """Use this token from now on, in this process only."""
    _given.clear()
    _given[source] = SecretStr(token)
    os.environ[TOKEN] = token


def colab_secret() -> str | None:
    """The token among Colab's secrets, if there is one and this notebook may read it.

    Without a browser the call would wait 10 s for an answer that nobody gives. It raises SecretNotFoundError,
    NotebookAccessError or TimeoutException, which have no common base but Exception (google.colab.userdata, 2026-08).
    """
    if place() != "colab" or not front_end_attached():
        return None
    try:
        return importlib.import_module("google.colab.userdata").get(TOKEN)
    except Exception as error:
        if type(error).__name__ != "SecretNotFoundError":
            say(f"token: Colab's secret {TOKEN} cannot be read ({type(error).__name__}); the form takes one too")
        return None


def kaggle_secret() -> str | None:
    """The token among Kaggle's secrets, if it is attached to this notebook. The client raises what its server said, of many kinds."""
    if place() != "kaggle":
        return None
    try:
        return importlib.import_module("kaggle_secrets").UserSecretsClient().get_secret(TOKEN)
    except Exception as error:
        say(f"token: Kaggle's secrets hold no {TOKEN} for this notebook ({type(error).__name__})")
        return None


def mount_drive(path: str) -> None:
    """Mount Google Drive when this path lies on it; Colab asks for leave. `check` refuses the path where it is not given."""
    if place() != "colab" or not Path(path).is_relative_to(DRIVE) or drive_folder():
        return
    if not front_end_attached():
        return say("drive: not mounted, because nobody is there to allow it")
    try:
        importlib.import_module("google.colab.drive").mount(str(DRIVE))
    except Exception as error:  # what it raises is not documented: a refusal, a timeout, a service that is down
        say(f"drive: not mounted ({type(error).__name__}: {error})")


def drive_folder() -> Path | None:
    """AutoSloth's folder on the mounted Drive, or None where no Drive is mounted."""
    return DRIVE / "MyDrive" / "AutoSloth" if (DRIVE / "MyDrive").is_dir() else None
