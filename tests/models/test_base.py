"""The base that is merged and exported is the one that was trained."""

import json
import shutil
import subprocess
import sys

import pytest
from support.hub_server import HubServer

from autosloth.errors import ModelError
from autosloth.models.base import export_base, identity
from autosloth.settings import SFTSettings


def test_a_base_whose_weights_are_others_by_now_is_refused(base, tmp_path):
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(base, tmp_path / "model")
    settings = SFTSettings(model=str(model))
    trained = identity(settings)
    with export_base(settings, trained=trained) as folder:
        assert folder == model
    weights = load_file(model / "model.safetensors")
    save_file({name: weight * 1.01 for name, weight in weights.items()}, model / "model.safetensors", {"format": "pt"})
    with (
        pytest.raises(ModelError, match="are others than those that were trained on"),
        export_base(settings, trained=trained),
    ):
        pass
    with export_base(SFTSettings(model=str(model), sixteen_bit_model=str(base)), trained=trained) as folder:
        assert folder == base  # that the user answers for


ASK = """
import json, sys
from autosloth.models.base import export_base, identity
from autosloth.settings import SFTSettings
settings = SFTSettings(model="me/model")
trained = json.loads(sys.argv[1]) or identity(settings)
with export_base(settings, trained=trained) as folder:
    print(json.dumps([trained, folder.name, json.loads((folder / "generation_config.json").read_text())]))
"""


def test_from_the_hub_the_commit_is_taken_that_was_trained(base, tmp_path):
    from huggingface_hub import HfApi

    def ask(trained):
        done = subprocess.run([sys.executable, "-c", ASK, json.dumps(trained)], env=hub.env(tmp_path / "home"), capture_output=True, text=True)  # fmt: skip
        assert not done.returncode, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    files = {path.name: path.read_bytes() for path in base.iterdir()}
    with HubServer() as hub:
        hub.add_repo("model", "me/model", files | {"generation_config.json": b'{"top_k": 1}'})
        trained, commit, first = ask(None)
        hub.add_token("hf_me", user="me")
        api = HfApi(endpoint=hub.url, token="hf_me")
        api.upload_file(path_or_fileobj=b'{"top_k": 2}', path_in_repo="generation_config.json", repo_id="me/model")
        assert ask(None)[2] == {"top_k": 2} and first == {"top_k": 1}
        assert ask(trained)[1:] == [commit, {"top_k": 1}]
