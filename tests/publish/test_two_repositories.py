"""A run on a Hub on loopback: the adapter first, two repositories, and a copy from which a lost run goes on."""

import shutil
import subprocess
import sys

import pytest
from support.commands import DEMO, killed_after, sets
from support.patience import until
from support.publishing import GGUF as FILE
from support.publishing import TOKENS, arrived, autosloth_apart, files_of, is_private, make_hub, make_run

from autosloth.errors import HubError
from autosloth.publish import refuse_foreign_token, repositories
from autosloth.publish.folder import fill
from autosloth.settings import SFTSettings

QUICK = {**DEMO, "max_steps": 6, "save_steps": 2, "eval_answers": 2, "max_new_tokens": 8, "merged": False}
REPO, GGUF, COPY = "team/short", "team/short-GGUF", "team/short-checkpoints"


@pytest.fixture
def hub():
    with make_hub() as hub:
        yield hub
        assert not hub.outside


def sft(hub, home, **settings):
    """The whole road of the embedded default, from `home`."""
    return autosloth_apart(hub, home, "sft", *sets(**QUICK | {"storage": home / "runs", **settings}))


def test_model_and_files_go_to_a_repository_each(hub, tmp_path):
    run = make_run(tmp_path / "runs", one_repo=False)
    assert autosloth_apart(hub, tmp_path / "home", "publish", run.folder).returncode == 0
    assert arrived(hub, "team/sloth") == files_of(run.path("publish"))
    assert arrived(hub, "team/sloth-GGUF") == files_of(run.path("publish-GGUF"))
    assert FILE not in arrived(hub, "team/sloth") and {FILE, "Modelfile"} < set(arrived(hub, "team/sloth-GGUF"))
    assert run.facts["publish"]["repos"] == ["team/sloth", "team/sloth-GGUF"]


@pytest.mark.parametrize("merged", [False, True])
def test_one_repository_with_an_adapter_s_file_has_its_template_once(tmp_path, merged):
    run = make_run(tmp_path / "runs", quantizations=["Q8_0", "adapter"], merged=merged)
    run.path("merged").mkdir()
    for folder in "adapter", "merged":
        run.path(folder, "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "all").mkdir()
    fill(run, tmp_path / "all", "both")
    assert (tmp_path / "all" / "chat_template.jinja").read_text() == "{{ messages }}"


def killed(hub, home, mark, **settings):
    """The whole road, ended as soon as the run has this file."""
    environment = hub.env(home / "huggingface", TOKENS["write"])
    environment.pop("PYTHONPATH", None)  # which the killer is brought by
    given = QUICK | {"storage": home / "runs", "publish_to_hub": True, **settings}
    killed_after(home / "runs" / "short" / mark, "sft", *sets(**given), cwd=home, **environment)


def test_a_token_that_may_not_write_one_of_the_repositories_is_refused(monkeypatch):
    scope = {"entity": {"name": REPO}, "permissions": ["repo.write"]}
    token = {"role": "fineGrained", "fineGrained": {"scoped": [scope]}}
    monkeypatch.setattr(repositories, "account", lambda: {"name": "team", "auth": {"accessToken": token}})
    for looks_there in ("refuse_taken", "refuse_foreign_copy"):
        monkeypatch.setattr(repositories, looks_there, lambda *_: None, raising=False)
    settings = SFTSettings(repo=REPO, run_name="short", publish_to_hub=True, one_repo=True)
    refuse_foreign_token(settings)
    for more, refused in ({"one_repo": False}, GGUF), ({"hub_checkpoints": True}, COPY):
        with pytest.raises(HubError, match=f"no permission to write to {refused}"):
            refuse_foreign_token(settings.model_copy(update=more))


@pytest.mark.slow
def test_the_adapter_is_safe_before_the_export_begins(hub, tmp_path):
    killed(hub, tmp_path, ".done/publish_adapter.json")
    assert {"adapter_model.safetensors", "tokenizer.json", "README.md"} <= set(arrived(hub, REPO))
    assert hub.commits("model", REPO)[-1].paths == ("README.md",)
    assert ("model", GGUF) not in hub.repos()
    adapter = arrived(hub, REPO)["adapter_model.safetensors"]
    result = sft(hub, tmp_path, publish_to_hub=True)
    assert result.returncode == 0, result.stderr
    assert "publish_adapter: done already" in result.stdout and hub.repos() == [("model", REPO), ("model", GGUF)]
    assert arrived(hub, REPO)["adapter_model.safetensors"] == adapter
    assert arrived(hub, REPO) == files_of(tmp_path / "runs" / "short" / "publish")


@pytest.mark.slow
def test_of_a_merged_run_the_adapter_is_kept_beside_the_model(hub, tmp_path):
    killed(hub, tmp_path, ".done/publish_adapter.json", merged=True)
    early = arrived(hub, REPO)
    assert "adapter/adapter_model.safetensors" in early and "model.safetensors" not in early
    assert sft(hub, tmp_path, publish_to_hub=True, merged=True).returncode == 0
    late = arrived(hub, REPO)
    assert "model.safetensors" in late and late["README.md"] != early["README.md"]
    assert late["adapter/adapter_model.safetensors"] == early["adapter/adapter_model.safetensors"]


@pytest.mark.slow
def test_a_hub_that_is_away_after_the_training_costs_nothing(hub, tmp_path):
    hub.fail_next("POST", "/api/repos/create", 403)
    result = sft(hub, tmp_path, publish_to_hub=True)
    assert result.returncode == 0 and "the adapter is not uploaded yet" in result.stdout, result.stderr
    assert arrived(hub, REPO) == files_of(tmp_path / "runs" / "short" / "publish")


@pytest.mark.slow
def test_a_published_training_stays_until_the_next_one_is_proven(hub, tmp_path):
    assert sft(hub, tmp_path, publish_to_hub=True, merged=True, one_repo=True).returncode == 0
    before = arrived(hub, REPO)
    (tmp_path / "runs" / "short" / ".done" / "publish_adapter.json").unlink()
    killed(hub, tmp_path, ".done/publish_adapter.json", learning_rate=1e-3)
    early = arrived(hub, REPO)
    adapter = {name: content for name, content in early.items() if name.startswith("adapter/")}
    assert early == before | adapter
    assert adapter["adapter/adapter_model.safetensors"] != before["adapter/adapter_model.safetensors"]
    assert sft(hub, tmp_path, publish_to_hub=True, learning_rate=1e-3).returncode == 0
    assert arrived(hub, REPO) == files_of(tmp_path / "runs" / "short" / "publish")
    assert arrived(hub, REPO)["adapter_model.safetensors"] == adapter["adapter/adapter_model.safetensors"]


@pytest.mark.slow
def test_one_repository_holds_all_where_it_is_asked_for(hub, tmp_path):
    assert sft(hub, tmp_path, publish_to_hub=True, one_repo=True).returncode == 0
    assert {"short-Q8_0.gguf", "Modelfile", "adapter_model.safetensors"} <= set(arrived(hub, REPO))
    assert hub.repos() == [("model", REPO)] and not (tmp_path / "runs" / "short" / "publish-GGUF").exists()


# -------------------- a copy of the run


@pytest.mark.slow
def test_a_lost_run_goes_on_from_its_copy_which_is_deleted_when_it_is_published(hub, tmp_path):
    killed(hub, tmp_path, ".done/publish_adapter.json", storage="hub")
    assert is_private(hub, COPY)
    shutil.rmtree(tmp_path / "runs")
    result = sft(hub, tmp_path, publish_to_hub=True, storage="hub")
    assert result.returncode == 0, result.stderr
    assert f"hub copy: runs/short goes on from {COPY}" in result.stdout
    assert hub.repos() == [("model", REPO), ("model", GGUF)]


def start(hub, home, road, **settings):
    """The whole road in a process that goes on by itself, its copy on the Hub."""
    given = QUICK | {"storage": "hub", "publish_to_hub": True, **settings}
    command = [sys.executable, "-m", "autosloth", road, *sets(**given)]
    home.mkdir(exist_ok=True)
    return subprocess.Popen(command, cwd=home, env=hub.env(home / "huggingface", TOKENS["write"]), stdout=subprocess.DEVNULL)  # fmt: skip


def copied(hub):
    """The files of the copy on the Hub, of which there may be none yet, or none any more."""
    try:
        return arrived(hub, COPY)
    except KeyError:
        return {}


@pytest.mark.slow
@pytest.mark.parametrize("road, worth, settings", [("sft", "checkpoints/checkpoint-", {"max_steps": 120}), ("spin", "rounds/0/train/answers-", {"rounds": 1, "prompts_per_round": 24})])  # fmt: skip
def test_a_machine_that_is_lost_in_mid_training_costs_what_came_after_the_copy(hub, tmp_path, road, worth, settings):
    process = start(hub, tmp_path / "one", road, **settings)
    until(lambda: any(name.startswith(worth) for name in copied(hub)) or process.poll() is not None, "the copy")
    process.kill()
    process.wait()
    kept = {name: content for name, content in copied(hub).items() if name.startswith(worth)}
    assert kept, "it ended before it was copied"
    given = QUICK | {"storage": "hub", "publish_to_hub": True, **settings}
    result = autosloth_apart(hub, tmp_path / "two", road, *sets(**given))
    assert result.returncode == 0, result.stderr
    assert f"hub copy: runs/short goes on from {COPY}" in result.stdout and ("model", COPY) not in hub.repos()
    if road == "sft":
        assert "train: going on from checkpoint-" in result.stdout
    else:  # the answers were not made again
        assert kept.items() <= files_of(tmp_path / "two" / "runs" / "short").items()
