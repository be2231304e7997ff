"""The real install cell and the three notebooks on what Colab's and Kaggle's images hold, google.colab played by a stub.

Their Python and their torch are too large for every run (see build.py): `make replica` builds them too, and `REPLICA=whole` runs these tests there.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from replica.build import IMAGES, replica
from support import releases
from support.commands import NOTEBOOK_OF
from support.patience import HUNG
from support.pins import KNOWN_EXCEPTIONS

HERE = Path(__file__).parent
PLACES = {"colab": {"COLAB_RELEASE_TAG": "played"}, "kaggle": {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}}
SHORT = {
    "model": "demo",
    "dataset": "demo",
    "max_steps": 4,
    "eval_rows": 8,
    "eval_answers": 2,
    "max_new_tokens": 16,
    "publish_unverified": True,
}
ROADS = {"sft": {}, "dpo": {}, "spin": {"rounds": 1, "prompts_per_round": 16}}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where a release of this repository is served, and the checkout that was released."""
    folder = tmp_path_factory.mktemp("release")
    releases.released(releases.checked_out(folder / "checkout"), folder / "released")
    with releases.served(folder / "released", folder / "served") as (address, _):
        yield address, folder / "released"


@pytest.fixture(params=IMAGES)
def image(request, tmp_path):
    """run(notebook, watched=False, **settings) -> (succeeded, what it showed), and the Python, on a fresh machine of an image."""
    kept = replica(request.param, whole=os.environ.get("REPLICA") == "whole")
    subprocess.run(
        ["cp", "-al", kept.parents[1], tmp_path / "machine"], check=True
    )  # pip replaces files, it does not write into them
    python = tmp_path / "machine" / "bin" / "python"
    place = request.param.partition("-")[0]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AUTOSLOTH_", "PYTEST_"))}
    clean |= PLACES[place] | {"AUTOSLOTH_CACHE": str(tmp_path.parent / "cache"), "PYTHONPATH": str(HERE / "image")}

    def run(notebook, watched=False, **settings):
        told = {f"AUTOSLOTH_{name.upper()}": str(value) for name, value in settings.items()}
        command = [python, HERE / "run_notebook.py", notebook, *(["watched"] if watched else [])]
        done = subprocess.run(command, cwd=tmp_path, env=clean | told, capture_output=True, text=True, timeout=3 * HUNG)
        return not done.returncode, done.stdout + done.stderr

    return run, python, place


def conflicts(python):
    """What `pip check` complains of: {(package, what it requires)}."""
    said = subprocess.run([python, "-m", "pip", "check"], capture_output=True, text=True).stdout
    return set(re.findall(r"^(\S+) \S+ (?:requires|has requirement) ([\w.-]+)", said, re.M))


def notebook_of(road, address, folder, before=()):
    """A released notebook whose home is the server; before: code in a cell ahead of all."""
    served, released = address
    notebook = json.loads((released / "notebooks" / NOTEBOOK_OF[road]).read_text().replace(releases.HOME, served))
    for code in before:
        cell = {
            "cell_type": "code",
            "execution_count": None,
            "id": "before",
            "metadata": {},
            "outputs": [],
            "source": code,
        }
        notebook["cells"].insert(0, cell)
    path = folder / f"{road}{'-before' if before else ''}.ipynb"
    path.write_text(json.dumps(notebook))
    return path


@pytest.mark.slow
def test_the_notebooks_install_themselves_and_run_to_their_end(image, address, tmp_path):
    run, python, place = image
    before = conflicts(python)
    loaded = notebook_of("sft", address, tmp_path, before=["import pandas"])
    done, said = run(loaded, **SHORT, run_name="sft")
    assert (
        not done
        and "had been imported in this session before it was replaced" in said
        and "once and press Run all again" in said
    ), said
    assert "install: replaced " in said and "torchao" in said and "Traceback" not in said
    for road, settings in ROADS.items():
        done, said = run(notebook_of(road, address, tmp_path), **SHORT, **settings, run_name=road)
        assert done, said[-6000:]
        assert (
            said.startswith(f"autosloth {releases.VERSION}, ")
            and f" on {place.title()}" in said
            and "install:" not in said
        )
        assert (
            json.loads((tmp_path / "runs" / road / "facts.json").read_text())["verify"]["files"][0]["token_mismatches"]
            == 0
        )
    asked = {(name, wanted) for name, wanted in KNOWN_EXCEPTIONS}
    assert {(name.lower(), wanted.lower()) for name, wanted in conflicts(python) - before} <= asked


@pytest.mark.slow
@pytest.mark.parametrize("image", [IMAGES[0]], indirect=True)
def test_a_secret_of_colabs_is_asked_for_where_somebody_is_there(image, address, tmp_path):
    run, _, _ = image
    notebook = json.loads(notebook_of("sft", address, tmp_path).read_text())
    notebook["cells"] = notebook["cells"][:5]  # as far as the form
    path = tmp_path / "form.ipynb"
    path.write_text(json.dumps(notebook))
    done, said = run(path)
    assert done and "stub: asked" not in said, said
    done, said = run(path, watched=True)
    assert done and "stub: asked for the secret HF_TOKEN" in said, said
