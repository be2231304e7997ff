"""Export on a disk that is too small for the base: shards come from the Hub one at a time, and go."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from support.commands import DEMO, sets
from support.hub_server import HubServer
from support.official import general, tensors

from autosloth import check
from autosloth.errors import StorageError
from autosloth.models.base import shard_sizes
from autosloth.run import read_json
from autosloth.settings import SFTSettings
from autosloth.weights import streamed
from autosloth.weights.streamed import shard_by_shard

SMALL = 6_000_000  # bytes of a disk on which the embedded base, 9.6 MB, has no room


@pytest.fixture(scope="module")
def shards(base, tmp_path_factory):
    """The embedded base as it stands on the Hub when it is large: in several files."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("shards")
    AutoModelForCausalLM.from_pretrained(base, dtype="auto").save_pretrained(folder, max_shard_size="2MB")
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    (folder / "consolidated.safetensors").write_bytes(b"the same weights in another form")
    return folder


def on_small_disk(home, command, **environment):
    """Run a command for which `home` is a disk of SMALL bytes, mounted in a namespace of its own."""
    mount = f"mount -t tmpfs -o size={SMALL} tmpfs {home}"
    if subprocess.run(["unshare", "--mount", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    look = (
        f"find {home} -name '*.safetensors' | wc -l"  # what is left in the Hub's cache, which ends with the namespace
    )
    script = f'{mount} && "$@" && {look}'
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *command],
        capture_output=True,
        text=True,
        env={n: v for n, v in environment.items() if not n.startswith("AUTOSLOTH_") or n == "AUTOSLOTH_CACHE"},
    )


@pytest.mark.slow
def test_a_base_larger_than_the_disk_is_exported_and_proven_shard_by_shard(base, finished, copied, shards, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    names = [path.name for path in sorted(shards.glob("model-*.safetensors"))]
    assert len(names) > 3 and sum((shards / name).stat().st_size for name in names) > SMALL
    with HubServer() as hub:
        hub.add_token("hf_reader", user="guest")
        hub.add_repo("model", "team/sharded", shards, private=True, readers=["guest"])
        cache = os.environ.get("AUTOSLOTH_CACHE") or str(base.parents[1])
        environment = hub.env(home, token="hf_reader") | {"AUTOSLOTH_CACHE": cache}
        settings = sets(
            **DEMO,
            storage=copied.parent,
            merged=True,
            sixteen_bit_model="team/sharded",
            quantizations="[q8_0, adapter]",
        )
        result = on_small_disk(home, [sys.executable, "-m", "autosloth", "sft", *settings], **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "0", "no shard is left in the cache"
    assert result.stdout.count("its shards are downloaded one at a time") == 3, "merge, gguf and verify"
    fetched = [line.split()[1].rstrip(",") for line in result.stdout.splitlines() if line.endswith("downloaded")]
    assert fetched[: 3 * len(names)] == names * 3, "each once, in turn, by each of them"
    assert set(fetched[3 * len(names) :]) < set(names), "and those that the adapter changes, for the adapter's own file"
    assert "hf_reader" not in result.stdout + result.stderr
    (file,) = (finished / "gguf").glob("*.gguf")
    assert tensors(copied / "gguf" / file.name) == tensors(file), "the same bits as of a base that lies on the disk"
    assert (
        general(copied / "gguf" / file.name)["general.base_model.0.repo_url"] == "https://huggingface.co/team/sharded"
    )
    proof = read_json(copied / "facts.json")["verify"]
    assert proof["passed"] and [file["weights"]["form"] for file in proof["files"]] == ["whole", "whole"]
    assert {path.name for path in (copied / "merged").glob("*.safetensors")} == set(names)
    assert any(path.endswith(names[0]) for _, path in hub.requests)
    assert not any("consolidated" in path for _, path in hub.requests), "a second form of the same weights"


CONVERT = """
import json, sys
from pathlib import Path
from autosloth.models.base import export_base
from autosloth.errors import AutoSlothError
from autosloth.settings import SFTSettings
from autosloth.weights.streamed import Shards
settings = SFTSettings(model="team/sharded", storage=sys.argv[1])
try:
    with export_base(settings, "gguf", writes=0.5) as base:
        shards = Shards(base)
        for name in shards.sizes:
            shards.need(base / name)
except AutoSlothError as error:
    print(error)
"""


def test_a_disk_without_room_for_one_shard_more_is_a_named_problem(shards, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    with HubServer() as hub:
        hub.add_repo("model", "team/sharded", shards)
        result = on_small_disk(home, [sys.executable, "-c", CONVERT, str(tmp_path / "runs")], **hub.env(home))
    assert result.returncode == 0, result.stderr
    assert "of team/sharded takes 0.00 GB, and 0.00 GB of disk are free. Free some space" in result.stdout


def test_a_connection_that_breaks_is_a_named_problem(shards, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    with HubServer() as hub:
        hub.add_repo("model", "team/sharded", shards)
        hub.fail_next("GET", r"00002-of-\d+\.safetensors", status=403, skip=1, times=99)  # behind its header
        result = on_small_disk(home, [sys.executable, "-c", CONVERT, str(tmp_path / "runs")], **hub.env(home))
    assert result.returncode == 0, result.stderr
    assert "The model team/sharded was refused" in result.stdout, result.stdout


def test_tensors_wait_for_the_last_of_their_shards_and_shards_for_the_last_of_their_tensors():
    needs = {"embedding": {"2"}, "stack": {"1", "3"}, "first": {"1"}, "constant": set(), "last": {"3"}}
    turns = list(shard_by_shard(needs))
    assert turns == [
        (["constant"], []),
        (["first"], []),
        (["embedding"], ["2"]),
        (["stack", "last"], ["1", "3"]),
    ]


@pytest.mark.parametrize(
    ("free", "writes", "same_disk", "short"),
    [(30, 0.5, True, False), (17, 0.5, True, True), (17, 0.5, False, False), (9, 0, False, True), (9.8, 0, True, True)],
)
def test_the_disk_is_short_when_it_lacks_room_for_what_is_fetched_and_written(
    monkeypatch, tmp_path, free, writes, same_disk, short
):
    """Three shards of 5 GB, one of them in the cache already."""
    infos = [SimpleNamespace(file_size=5e9, will_download=number > 0) for number in range(3)]
    monkeypatch.setattr(streamed.shutil, "disk_usage", lambda path: SimpleNamespace(free=free * 1e9))
    monkeypatch.setattr(streamed, "same_disk", lambda one, other: same_disk)
    assert streamed.is_short(infos, tmp_path / "runs", writes) == short


def test_the_check_counts_a_shard_of_the_base_and_not_the_whole(monkeypatch, tmp_path):
    sizes = {
        "team/base": {"model-1.safetensors": 5e9, "model-2.safetensors": 5e9},
        "team/base-bnb-4bit": {"model.safetensors": 3e9},
        "team/fp8": {"model.safetensors": 5e9},
    }
    monkeypatch.setattr(check, "shard_sizes", lambda source, revision=None: sizes[source])
    forms = {"team/base-bnb-4bit": "bitsandbytes", "team/fp8": "fp8"}
    monkeypatch.setattr("autosloth.models.base.stored_as", lambda source, revision=None: forms.get(source))
    plain = SFTSettings(model="team/base", dataset="demo", storage=str(tmp_path), quantizations=["q8_0"])
    small = plain.model_copy(update={"model": "team/base-bnb-4bit"})
    q8 = 10e9 * 8.5 / 16
    assert check.disk_needed(plain) == pytest.approx((10e9, q8, q8 + 5e9))
    assert check.disk_needed(small) == pytest.approx((8e9, q8, 8e9 + q8))
    assert check.disk_needed(small.model_copy(update={"quantizations": []})) == (3e9, 0, 3e9)
    merged = plain.model_copy(update={"merged": True})
    assert check.disk_needed(merged) == pytest.approx((10e9, 10e9 + q8, 15e9 + q8))
    packed = merged.model_copy(update={"model": "team/fp8"})
    assert check.disk_needed(packed) == pytest.approx((5e9, 10e9 + q8, 15e9 + q8))

    free = {"run": 6e9, "cache": 11e9}
    monkeypatch.setattr(check, "cache_folder", lambda: "cache")
    monkeypatch.setattr(check, "existing_parent", lambda folder: "run")
    monkeypatch.setattr(check, "same_disk", lambda one, other: False)
    monkeypatch.setattr(check.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[folder]))
    check.check_disk(plain)
    free["cache"] = 10e9
    with pytest.raises(StorageError, match=r"about 10\.5 GB of disk, and 10\.0 GB are free at cache, the Hub's cache"):
        check.check_disk(plain)
    free["run"] = 5e9
    with pytest.raises(StorageError, match=rf"about 5\.8 GB of disk, and 5\.0 GB are free at {tmp_path}\."):
        check.check_disk(plain)
    monkeypatch.setattr(check, "same_disk", lambda one, other: True)
    with pytest.raises(StorageError, match=r"about 10\.8 GB of disk, and 5\.0 GB"):
        check.check_disk(plain)


def test_a_second_form_of_the_weights_is_not_counted(shards):
    index = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
    assert shard_sizes(str(shards)).keys() == set(index.values())
