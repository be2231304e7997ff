"""Each block of Python in a card runs as it stands there, against a Hub on loopback that holds what the card speaks of."""

import re
import shutil
import subprocess
import sys

import pytest
import yaml
from support.cards import FACTS, found
from support.hub_server import HubServer
from support.patience import HUNG

from autosloth.models import origin_of
from autosloth.publish.card import render_card
from autosloth.publish.folder import fill
from autosloth.publish.kept import split
from autosloth.publish.settings_file import base_commit, dataset_commits, settings_file
from autosloth.run import Run, read_json, write_json
from autosloth.settings import SFTSettings

BASE, REPO = "team/base", "team/short"


@pytest.fixture
def run(copied):
    """The finished run as one of a base on the Hub, to be published by its team."""
    run = Run.open(copied)
    run.settings = run.settings.model_copy(update={"model": BASE, "repo": REPO})
    run.record("origin", asked=[BASE, None, None, "demo"], original=BASE, on_hub=[BASE])
    config = read_json(run.path("adapter", "adapter_config.json"))
    write_json(run.path("adapter", "adapter_config.json"), config | {"base_model_name_or_path": BASE})
    return run


def run_blocks(run, kind, home, repos):
    """Run all Python of a card; repos: folders by the repository that they are. Gives what each block says, by the library that it imports first."""
    text, said = render_card(run, kind), {}
    with HubServer() as hub:
        for repo, folder in repos.items():
            hub.add_repo("model", repo, folder)
        for code in re.findall(r"```python\n(.*?)```", text, re.S):
            command = [sys.executable, "-c", code]
            ended = subprocess.run(
                command, cwd=run.path("gguf"), env=hub.env(home), capture_output=True, text=True, timeout=HUNG
            )
            assert ended.returncode == 0, code + ended.stderr[-3000:]
            said.setdefault(code.split()[1], []).append(ended.stdout.splitlines()[-1])
        assert not hub.outside
    return said


def expected(run):
    """The trained model's own answer to the question of the card."""
    return run.facts["eval"]["after"]["samples"][0]["answer"]


@pytest.mark.slow
def test_those_of_a_merged_model_with_its_gguf(run, tmp_path):
    (tmp_path / "all").mkdir()
    fill(run, tmp_path / "all", "both")
    said = run_blocks(run, "both", tmp_path / "home", {REPO: tmp_path / "all"})
    assert {library: len(answers) for library, answers in said.items()} == {
        "transformers": 1,
        "unsloth": 1,
        "llama_cpp": 2,
    }
    assert said["transformers"] == said["unsloth"] == [expected(run)]
    assert len(set(said["llama_cpp"])) == 1 and said["llama_cpp"][0]  # rounded, it may answer a near tie otherwise


@pytest.mark.slow
def test_those_of_an_adapter(run, base, tmp_path):
    run.settings = run.settings.model_copy(update={"merged": False})
    said = run_blocks(run, "model", tmp_path, {REPO: run.path("adapter"), BASE: base})
    assert said == {"transformers": [expected(run)], "unsloth": [expected(run)]}


@pytest.mark.slow
def test_that_of_an_adapter_whose_merged_weights_follow(run, base, tmp_path):
    run.record("merge", path=None)
    shutil.copytree(run.path("adapter"), tmp_path / "repo" / "adapter")
    said = run_blocks(run, "model", tmp_path / "home", {REPO: tmp_path / "repo", BASE: base})
    assert said == {"peft": [expected(run)]}


def test_those_of_the_gguf_files_alone(run, tmp_path):
    said = run_blocks(run, "gguf", tmp_path, {f"{REPO}-GGUF": run.path("gguf")})
    assert said.keys() == {"llama_cpp"} and len(said["llama_cpp"]) == 2 and len(set(said["llama_cpp"])) == 1


def test_the_settings_in_the_repository_are_those_of_the_run(finished):
    run, path = Run.open(finished), finished / "publish" / "settings.yaml"
    again = SFTSettings.load(path)
    here = {"storage", "repo", "publish_to_hub", "publish_unverified"}
    assert again.model_dump(exclude=here) == run.settings.model_dump(exclude=here)
    assert yaml.safe_load(path.read_text())["road"] == "sft"
    assert "autosloth sft settings.yaml" in (finished / "publish" / "README.md").read_text()


def test_the_settings_in_the_repository_tell_nothing_of_this_machine_and_load(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    address = "https://mila:word@a.b/c.jsonl?token=key"
    parts = [{"path": str(tmp_path / "rows.jsonl")}, {"path": address}, {"path": "team/questions"}]
    settings = SFTSettings(
        **{
            "model": str(tmp_path),
            "dataset": parts,
            "storage": str(tmp_path),
            "chat_template": f"{tmp_path}/own.jinja",
        },
        **{"repo": REPO, "publish_to_hub": True, "adapter": str(tmp_path), "private": True, "card_rows": False},
    )
    text = settings_file(settings)
    assert not any(word in text for word in (str(tmp_path.parent), "word", "key", REPO, "publish"))
    (tmp_path / "settings.yaml").write_text(text)
    again = SFTSettings.load(tmp_path / "settings.yaml")
    assert [part["path"] for part in again.parts] == ["rows.jsonl", "https://a.b/c.jsonl", "team/questions"]
    assert (again.model, again.chat_template, again.adapter) == (tmp_path.name, "own.jinja", tmp_path.name)
    assert (again.private, again.card_rows) == (True, False)


def test_the_settings_in_the_repository_pin_the_base_and_tell_the_rows(tmp_path):
    settings = SFTSettings(model="team/base", revision="main", dataset="team/questions", seed=7)
    text = settings_file(settings, ["team/base", "team/questions"], "a" * 40, {"team/questions": "b" * 40})
    (tmp_path / "settings.yaml").write_text(text)
    again = SFTSettings.load(tmp_path / "settings.yaml")
    assert (again.model, again.revision, again.seed) == ("team/base", "a" * 40, 7)
    assert (
        f"\n# The rows of team/questions as they were: https://huggingface.co/datasets/team/questions/tree/{'b' * 40} ("
        in text
    )
    assert "model: unsloth/mistral-7b-bnb-4bit\nrevision: aa" in settings_file(SFTSettings(), None, "a" * 40)


def test_of_folders_no_commit_is_pinned_and_of_several_datasets_each(tmp_path):
    parts = [{"path": "team/a"}, {"path": "team/b"}, {"path": "rows.jsonl"}]
    settings = SFTSettings(model="base", dataset=parts, storage=str(tmp_path))
    run = run_with_facts(settings, found("base", settings.dataset_name, None, on_hub=["team/a", "team/b"]))
    run.record("data", revision=None, revisions={"team/a": "a" * 40, "team/b": "b" * 40})
    assert base_commit(run) is None and dataset_commits(run) == {"team/a": "a" * 40, "team/b": "b" * 40}
    card = render_card(run)
    assert f"| commit of team/a | {'a' * 40} |" in card and f"| commit of team/b | {'b' * 40} |" in card
    assert "| base commit |" not in card and "The rows come as they are in these datasets by then" in card


def run_with_facts(settings, origin):
    """A run of these settings with the facts of a card."""
    run = Run.create(settings)
    write_json(run.path("facts.json"), FACTS | {"origin": origin})
    return run


@pytest.mark.parametrize("path", [".", "/", "..", "C:\\Users\\mila\\rows.jsonl", "https://me:word@a.b?file=x.jsonl"])
def test_the_settings_in_the_repository_load_whatever_the_dataset_is_called(tmp_path, path):
    settings = SFTSettings(model=".", dataset=path, chat_template="C:\\Users\\mila\\own.jinja")
    text = settings_file(settings)
    (tmp_path / "settings.yaml").write_text(text)
    again = SFTSettings.load(tmp_path / "settings.yaml")
    assert (again.model, again.chat_template) == ("local", "own.jinja") and again.dataset in (
        "local",
        "..",
        "rows.jsonl",
        "https://a.b",
    )
    assert "mila" not in text and "word" not in text


@pytest.mark.parametrize(
    "address",
    ["https://k3y:k3y@a.b?file=x.jsonl", "https://a.b/x.jsonl#token=k3y", "https://me:wo/k3y@a.b/x.jsonl", "https://k3y:wo?k3y@a.b/x"],
)  # fmt: skip
def test_no_secret_of_an_address_leaves(address, tmp_path):
    settings = SFTSettings(model="team/base", dataset=address, storage=str(tmp_path))
    card = render_card(run_with_facts(settings, found("team/base", address, "team/base", on_hub=["team/base"])))
    for text in (settings_file(settings), settings.run_name, card):
        assert "k3y" not in text


def test_a_folder_named_like_a_repository_is_not_linked(tmp_path, monkeypatch):
    for name in ("base", "team/rows"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    run = run_with_facts(SFTSettings(model="base", dataset="team/rows", storage=str(tmp_path)), {})
    origin_of(run)  # as the training does
    monkeypatch.chdir(tmp_path / "team")
    card = render_card(Run.open(run.folder))
    matter = yaml.safe_load(card.split("---")[1])
    assert "datasets" not in matter and "base_model" not in matter
    assert "co/base" not in card and "team/rows" not in card and "| dataset | rows, " in card


def test_names_and_rows_break_nothing_in_a_card(tmp_path):
    path = "/a/b|c\n<i>\x1bd.jsonl"
    settings = SFTSettings(model="team/base", dataset=path, run_name="my-run", storage=str(tmp_path))
    run = run_with_facts(settings, found("team/base", path, "team/base", on_hub=["team/base"]))
    run.record("data", unused=["x|y", "<b>\nz"])
    evaluation = run.facts["eval"]
    evaluation["after"]["samples"][0] |= {"answer": "\x1b[1m" + "x" * 200_000, "question": "a\x00\r\nb"}
    run.record("eval", **evaluation)
    card = render_card(run)
    assert "| dataset | b&#124;c &lt;i> d.jsonl, " in card and "not used: x&#124;y, &lt;b> z |" in card
    assert (
        not set(card) & set("\x00\x1b\r")
        and "<i>" not in split(card)[1].replace("`b|c <i> d.jsonl`", "")
        and "xx ...\n" in card
        and len(card) < 20_000
    )
    assert "    question  a\n              b\n" in card
