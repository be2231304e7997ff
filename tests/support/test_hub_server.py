"""The loopback Hub answers the real clients: huggingface_hub, datasets and transformers run in a second process with its `env`."""

import hashlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import pytest

from support.hub_server import HubServer

README = b"---\nlicense: mit\n---\n# A model\n"
WEIGHTS = random.Random(0).randbytes(2_000_000)
FILES = {"README.md": README, "config.json": b"{}", "adapter/model.safetensors": WEIGHTS}
QUESTIONS = [{"question": f"{n} + {n}", "answer": str(2 * n)} for n in range(50)]
JSONL = "".join(json.dumps(row) + "\n" for row in QUESTIONS).encode()


@pytest.fixture(scope="module")
def hub():
    with HubServer() as hub:
        hub.add_token("hf_write", user="team")
        hub.add_token("hf_read", user="team", role="read")
        hub.add_token("hf_guest", user="guest")
        hub.add_token("hf_stranger", user="eve")
        hub.add_token("hf_fine", user="ana", orgs=["team"], role="fineGrained", permissions=["repo.write"])
        hub.add_token("hf_fine_read", user="ben", orgs=["team"], role="fineGrained", permissions=["repo.content.read"])
        hub.add_repo("model", "team/public", {"README.md": README, "digits.txt": b"0123456789"})
        hub.add_repo("model", "team/private", {"README.md": README}, private=True, readers=["guest"])
        hub.add_repo("model", "team/gated", {"README.md": README}, gated=True)
        hub.add_repo("dataset", "team/questions", {"train.jsonl": JSONL, "test.jsonl": JSONL[:-1]})
        hub.add_repo("dataset", "team/gated", {"train.jsonl": JSONL}, gated=True)
        yield hub
        assert not hub.outside


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """Call a function of this file in one process that has the Hub's environment from its start."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, hub.env(tmp_path_factory.mktemp("home")), clear=True):
            pool.submit(int).result()
        yield lambda job, *arguments, **keywords: pool.submit(job, *arguments, **keywords).result()


@pytest.fixture(scope="module")
def api(client):
    """Call a method of HfApi, anonymously or with `token`."""
    return lambda method, *arguments, **keywords: client(call_api, method, *arguments, **keywords)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("out"), FILES)


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def read_files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


# -------------------- jobs of the client process


def call_api(method: str, *arguments, token=False, **keywords):
    """What one method of HfApi returns, or the name and status of the error that it raises."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        result = getattr(HfApi(token=token), method)(*arguments, **keywords)
    except HfHubHTTPError as error:
        return type(error).__name__, error.response.status_code
    return str(result) if isinstance(result, str) else result


def publish(repo_id: str, folder: Path, message: str = "Upload") -> str:
    """The commit that an uploaded folder ends in."""
    from huggingface_hub import HfApi

    api = HfApi(token="hf_write")
    api.create_repo(repo_id, exist_ok=True)
    return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message).oid


def read_hashes(repo_id: str) -> list[dict]:
    """{path: (blob id, SHA-256 in LFS)} by each of the three calls that tell it."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(token=False)
    siblings = api.repo_info(repo_id, files_metadata=True).siblings
    tree = [entry for entry in api.list_repo_tree(repo_id, recursive=True) if isinstance(entry, RepoFile)]
    asked = api.get_paths_info(repo_id, [entry.path for entry in tree] + ["missing.txt"])
    return [{f.rfilename: (f.blob_id, f.lfs and f.lfs.sha256) for f in files} for files in (siblings, tree, asked)]


def read_middle(path: str, start: int, size: int) -> bytes:
    from huggingface_hub import HfFileSystem

    with HfFileSystem(token=False).open(path, block_size=65536) as file:
        file.seek(start)
        return file.read(size)


def load_rows(*arguments, **keywords) -> list[dict] | str:
    """The rows of a dataset, or what the error says."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(*arguments, **keywords).to_list()
    except DatasetNotFoundError as error:
        return str(error)


def config_names(repo_id: str) -> list[str]:
    from datasets import get_dataset_config_names

    return get_dataset_config_names(repo_id)


def make_parquet(rows: list[dict]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def make_tiny_llama(folder: Path) -> None:
    """An untrained Llama of a few thousand weights and a tokenizer of eight words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = ["<unk>", "<s>", "</s>", "the", "cat", "sat", "on", "mat"]
    vocabulary = {word: index for index, word in enumerate(words)}
    splitter = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    splitter.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitter, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_model(model: str | Path, text: str) -> tuple[str, list[int], list[float]]:
    """The model's type, the text's tokens, and the scores of the next one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config, tokenizer = AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    batch = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        scores = AutoModelForCausalLM.from_pretrained(model)(**batch).logits[0, -1]
    return config.model_type, batch["input_ids"][0].tolist(), scores.tolist()


# -------------------- uploading


def test_an_uploaded_folder_arrives_whole(hub, client, folder):
    client(publish, "team/whole", folder)
    stored = hub.files("model", "team/whole")
    del stored[".gitattributes"]
    assert stored == FILES


def test_only_binary_files_go_through_lfs(hub, client, folder):
    client(publish, "team/lfs", folder)
    puts = [path for method, path in hub.requests if method == "PUT" and path.startswith("/team/lfs.git")]
    assert puts == [f"/team/lfs.git/info/lfs/objects/{hashlib.sha256(WEIGHTS).hexdigest()}"]


def test_hashes_read_back_are_those_of_the_files(client, folder):
    client(publish, "team/hashes", folder)
    by_info, by_tree, by_path = client(read_hashes, "team/hashes")
    assert by_info == by_tree == by_path
    assert by_info["README.md"] == (hashlib.sha1(b"blob %d\0" % len(README) + README).hexdigest(), None)
    assert by_info["adapter/model.safetensors"][1] == hashlib.sha256(WEIGHTS).hexdigest()


def test_uploading_the_same_again_makes_no_commit(hub, client, folder):
    assert client(publish, "team/twice", folder) == client(publish, "team/twice", folder)
    assert [commit.message for commit in hub.commits("model", "team/twice")] == ["initial commit", "Upload"]


def test_commits_keep_their_order_and_paths(hub, client, api, folder):
    client(publish, "team/order", folder)
    for path in "b.txt", "a.txt":
        upload = {"path_or_fileobj": b"text", "path_in_repo": path, "repo_id": "team/order"}
        api("upload_file", **upload, commit_message=f"Add {path}", token="hf_write")
    commits = hub.commits("model", "team/order")
    assert [commit.message for commit in commits] == ["initial commit", "Upload", "Add b.txt", "Add a.txt"]
    assert [commit.paths for commit in commits[2:]] == [("b.txt",), ("a.txt",)]


def test_a_deleted_file_stays_in_the_older_revision(hub, client, api, folder):
    older = client(publish, "team/deleted", folder)
    api("delete_file", "README.md", "team/deleted", token="hf_write")
    assert "README.md" not in hub.files("model", "team/deleted")
    assert Path(api("hf_hub_download", "team/deleted", "README.md", revision=older)).read_bytes() == README


def test_a_dataset_is_uploaded_to_its_own_address(hub, api, folder):
    api("create_repo", "team/rows", repo_type="dataset", private=True, token="hf_write")
    api("upload_folder", repo_id="team/rows", repo_type="dataset", folder_path=folder, token="hf_write")
    assert hub.files("dataset", "team/rows")["adapter/model.safetensors"] == WEIGHTS
    assert api("dataset_info", "team/rows", token="hf_write").private


def test_an_existing_repo_is_refused_unless_allowed(api):
    assert api("create_repo", "team/public", token="hf_write") == ("HfHubHTTPError", 409)
    assert api("create_repo", "team/public", exist_ok=True, token="hf_write").endswith("/team/public")


def test_a_deleted_folder_leaves_the_other_files(hub, client, api, folder):
    client(publish, "team/emptied", folder)
    api("delete_folder", "adapter", "team/emptied", token="hf_write")
    assert set(hub.files("model", "team/emptied")) == {".gitattributes", "README.md", "config.json"}


def test_an_upload_deletes_what_its_patterns_name(hub, client, api, folder, tmp_path):
    client(publish, "team/patterns", folder)
    small = write_files(tmp_path, {"README.md": README})
    upload = {"repo_id": "team/patterns", "folder_path": small, "token": "hf_write"}
    api("upload_folder", **upload, delete_patterns=["*.json", "adapter/*"])
    assert api("list_repo_files", "team/patterns") == [".gitattributes", "README.md"]


def test_a_deleted_repo_is_gone(hub, client, api, folder):
    client(publish, "team/gone", folder)
    api("delete_repo", "team/gone", token="hf_read")
    assert ("model", "team/gone") in hub.repos()
    api("delete_repo", "team/gone", token="hf_write")
    assert ("model", "team/gone") not in hub.repos()
    assert api("delete_repo", "team/gone", token="hf_write") == ("RepositoryNotFoundError", 404)
    assert api("delete_repo", "team/gone", token="hf_write", missing_ok=True) is None


def test_a_squashed_history_is_one_commit_with_the_same_files(hub, client, api, folder):
    client(publish, "team/squashed", folder)
    before = hub.files("model", "team/squashed")
    api("super_squash_history", "team/squashed", commit_message="One", token="hf_write")
    assert [commit.message for commit in hub.commits("model", "team/squashed")] == ["One"]
    assert hub.files("model", "team/squashed") == before


def test_the_visibility_of_a_repo_can_be_changed(client, api, folder):
    client(publish, "team/hidden", folder)
    api("update_repo_settings", "team/hidden", private=True, token="hf_write")
    assert api("model_info", "team/hidden", token="hf_write").private
    assert api("model_info", "team/hidden") == ("RepositoryNotFoundError", 401)


def test_a_private_snapshot_is_for_its_owner(client, api, folder, tmp_path):
    client(publish, "team/own", folder)
    api("update_repo_settings", "team/own", private=True, token="hf_write")
    api("snapshot_download", "team/own", local_dir=tmp_path, token="hf_write")
    assert (tmp_path / "adapter/model.safetensors").read_bytes() == WEIGHTS


# -------------------- failures on demand


@pytest.mark.parametrize("status", [500, None], ids=["error", "cut"])
def test_the_client_repeats_a_failed_upload(hub, client, folder, status):
    repo_id = f"team/retry-{status}"
    hub.fail_next("PUT", repo_id, status)
    client(publish, repo_id, folder)
    assert [m for m, path in hub.requests if m == "PUT" and repo_id in path] == ["PUT", "PUT"]
    assert hub.files("model", repo_id)["adapter/model.safetensors"] == WEIGHTS


def test_after_a_failed_commit_nothing_large_is_sent_again(hub, client, api, folder):
    hub.fail_next("POST", "/team/resumed/commit/main")
    api("create_repo", "team/resumed", token="hf_write")
    upload = {"repo_id": "team/resumed", "folder_path": folder, "token": "hf_write"}
    assert api("upload_folder", **upload) == ("HfHubHTTPError", 500)
    assert len(hub.commits("model", "team/resumed")) == 1
    client(publish, "team/resumed", folder)
    assert len([path for method, path in hub.requests if method == "PUT" and "team/resumed" in path]) == 1


def test_skip_lets_the_first_requests_pass(hub, api):
    hub.fail_next("GET", "/api/models/team/public$", status=500, skip=1, times=2)
    answers = [api("model_info", "team/public") for _ in range(4)]
    assert [isinstance(answer, tuple) for answer in answers] == [False, True, True, False]


@pytest.mark.parametrize("path", ["README.md", "adapter/model.safetensors"])
def test_a_tampered_upload_shows_in_the_hashes_until_it_is_repeated(hub, client, folder, path):
    repo_id = f"team/tampered-{len(path)}"
    hub.tamper("model", repo_id, path, b"something else")
    client(publish, repo_id, folder)
    wrong = client(read_hashes, repo_id)[0][path]
    client(publish, repo_id, folder)
    assert hub.files("model", repo_id)[path] == FILES[path]
    assert client(read_hashes, repo_id)[0][path] != wrong


# -------------------- downloading


def test_a_snapshot_holds_the_same_files(client, api, folder, tmp_path):
    client(publish, "team/snapshot", folder)
    api("snapshot_download", "team/snapshot", local_dir=tmp_path, ignore_patterns=".gitattributes")
    assert {name: data for name, data in read_files(tmp_path).items() if not name.startswith(".cache")} == FILES


def test_the_file_system_reads_the_middle_of_a_file(client, folder):
    client(publish, "team/middle", folder)
    middle = client(read_middle, "team/middle/adapter/model.safetensors", 1_000_000, 100)
    assert middle == WEIGHTS[1_000_000:1_000_100]


@pytest.mark.parametrize(
    "wanted, status, body",
    [
        ("bytes=2-4", 206, b"234"),
        ("bytes=7-", 206, b"789"),
        ("bytes=-2", 206, b"89"),
        ("bytes=8-99", 206, b"89"),
        ("bytes=10-", 416, b""),
        ("lines=1-2", 200, b"0123456789"),
    ],
)
def test_ranges_are_honoured(hub, wanted, status, body):
    request = urllib.request.Request(f"{hub.url}/team/public/resolve/main/digits.txt", headers={"Range": wanted})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        reply = opener.open(request)
    except urllib.error.HTTPError as error:
        reply = error
    assert (reply.status, reply.read()) == (status, body)


# -------------------- tokens, rights, things that are not there


@pytest.mark.parametrize(
    "method, arguments, token, expected",
    [
        ("model_info", ["team/missing"], False, ("RepositoryNotFoundError", 401)),
        ("model_info", ["team/missing"], "hf_read", ("RepositoryNotFoundError", 404)),
        ("dataset_info", ["team/public"], "hf_read", ("RepositoryNotFoundError", 404)),
        ("model_info", ["team/public"], "hf_wrong", ("HfHubHTTPError", 401)),
        ("model_info", ["team/private"], False, ("RepositoryNotFoundError", 401)),
        ("model_info", ["team/private"], "hf_stranger", ("RepositoryNotFoundError", 404)),
        ("auth_check", ["team/private"], "hf_fine_read", None),
        ("auth_check", ["team/private"], "hf_guest", None),
        ("hf_hub_download", ["team/gated", "README.md"], False, ("GatedRepoError", 401)),
        ("hf_hub_download", ["team/gated", "README.md"], "hf_guest", ("GatedRepoError", 403)),
        ("auth_check", ["team/gated"], "hf_guest", ("GatedRepoError", 403)),
        ("auth_check", ["team/gated"], "hf_read", None),
        ("hf_hub_download", ["team/public", "missing.txt"], False, ("RemoteEntryNotFoundError", 404)),
        ("whoami", [], "hf_wrong", ("HfHubHTTPError", 401)),
        ("create_repo", ["team/new"], "hf_read", ("HfHubHTTPError", 403)),
        ("create_repo", ["team/new"], "hf_guest", ("HfHubHTTPError", 403)),
        ("create_repo", ["team/new"], "hf_fine_read", ("HfHubHTTPError", 403)),
        ("delete_file", ["README.md", "team/public"], "hf_guest", ("HfHubHTTPError", 403)),
        ("list_repo_refs", ["team/public"], "hf_write", ("HfHubHTTPError", 404)),
    ],
)
def test_refusals_reach_the_client_as_its_own_errors(api, method, arguments, token, expected):
    assert api(method, *arguments, token=token) == expected


def test_an_unknown_revision_is_its_own_error(api):
    assert api("model_info", "team/public", revision="v9") == ("RevisionNotFoundError", 404)


def test_a_refused_creation_leaves_no_repo(hub, api):
    api("create_repo", "team/refused", token="hf_read")
    assert ("model", "team/refused") not in hub.repos()


def test_a_member_creates_in_the_organisation(hub, api):
    api("create_repo", "team/by-ana", token="hf_fine")
    assert ("model", "team/by-ana") in hub.repos()


def test_whoami_tells_the_role_of_the_token(api):
    assert api("whoami", token="hf_read")["auth"]["accessToken"]["role"] == "read"
    fine = api("whoami", token="hf_fine")
    assert [org["name"] for org in fine["orgs"]] == ["team"]
    assert fine["auth"]["accessToken"]["fineGrained"]["scoped"][1]["permissions"] == ["repo.write"]


def test_the_environment_carries_no_token_of_its_own(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not {"HF_TOKEN", "HF_HUB_OFFLINE"} & set(hub.env(tmp_path))
    assert hub.env(tmp_path, token="hf_write")["HF_TOKEN"] == "hf_write"


@pytest.mark.parametrize("address", ["https://example.org/", "http://example.org/"])
def test_a_subprocess_reaches_no_other_address(tmp_path, address):
    script = f"import urllib.request; urllib.request.urlopen({address!r})"
    with HubServer() as hub:
        done = subprocess.run([sys.executable, "-c", script], env=hub.env(tmp_path), capture_output=True, check=False)
    assert b"403" in done.stderr
    assert len(hub.outside) == 1 and "example.org" in hub.outside[0]


# -------------------- datasets


def test_a_dataset_loads_by_its_id(client):
    assert client(load_rows, "team/questions", split="train") == QUESTIONS


def test_a_slice_of_a_dataset_loads(client):
    assert client(load_rows, "team/questions", split="train[:20]") == QUESTIONS[:20]


def test_each_config_of_a_dataset_loads_by_its_name(hub, client):
    configs = [{"config_name": name, "data_files": f"{name}/*.jsonl"} for name in ("easy", "hard")]
    card = f"---\nconfigs: {json.dumps(configs)}\n---\n# Questions\n".encode()
    hub.add_repo(
        "dataset", "team/levels", {"README.md": card, "easy/a.jsonl": JSONL, "hard/b.jsonl": b'{"question": 1}'}
    )
    assert client(config_names, "team/levels") == ["easy", "hard"]
    assert client(load_rows, "team/levels", "easy", split="train") == QUESTIONS
    assert client(load_rows, "team/levels", "hard", split="train") == [{"question": 1}]


def test_a_dataset_in_parquet_loads(hub, client):
    hub.add_repo("dataset", "team/table", {"data/train-00000-of-00001.parquet": client(make_parquet, QUESTIONS)})
    assert client(load_rows, "team/table", split="train") == QUESTIONS


def test_a_gated_dataset_loads_only_with_a_token_that_may(client):
    assert "gated dataset" in client(load_rows, "team/gated", split="train", token="hf_guest")
    assert client(load_rows, "team/gated", split="train", token="hf_read") == QUESTIONS


def test_a_dataset_that_does_not_exist_is_said_not_to(client):
    assert "doesn't exist" in client(load_rows, "team/missing", split="train")


# -------------------- transformers


def test_a_model_loaded_by_its_id_is_the_one_in_the_folder(hub, client, tmp_path):
    client(make_tiny_llama, tmp_path)
    hub.add_repo("model", "team/tiny", tmp_path)
    answer = client(run_model, "team/tiny", "the cat sat")
    assert answer[:2] == ("llama", [3, 4, 5])
    assert answer == client(run_model, tmp_path, "the cat sat")
