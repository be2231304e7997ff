"""`autosloth publish` and the checks before it, against a Hub on loopback: all in one other process, in which nobody sleeps between tries."""

import hashlib
from pathlib import Path

import pytest
from support.commands import quick_process
from support.hub_server import File
from support.publishing import (
    EVALUATION,
    FACTS,
    GGUF,
    GGUF_BYTES,
    NAME,
    REPO,
    TOKENS,
    add_tokens,
    arrived,
    assert_named_problem,
    autosloth,
    autosloth_apart,
    check,
    environment,
    files_of,
    is_private,
    lfs_uploads,
    make_hub,
    make_run,
    publish_whole,
)  # fmt: skip

from autosloth.run import Run, stage, write_json


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A Hub, and a process that has its environment from the start: `autosloth` works there."""
    with make_hub() as hub, quick_process(environment(hub, tmp_path_factory.mktemp("home"))) as hub.pool:
        yield hub


@pytest.fixture
def hub(server):
    """The same Hub, empty and well."""
    for kind, repo in server.repos():
        server.remove_repo(kind, repo)
    server.forget_faults()
    server.requests.clear()
    add_tokens(server)
    yield server
    assert not server.outside


# -------------------- a good token


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A run published once with `repo` left empty: (the Hub, the run)."""
    folder = tmp_path_factory.mktemp("published")
    run = make_run(folder / "runs")
    with make_hub() as hub:
        assert autosloth_apart(hub, folder / "home", "publish", run.folder).returncode == 0
        assert arrived(hub) == files_of(run.path("publish"))
        yield hub, run


def test_everything_in_the_publish_folder_arrives(published):
    hub, _ = published
    assert set(arrived(hub)) == {
        *("README.md", "Modelfile", "settings.yaml", GGUF),
        *("adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json"),
    }


def test_the_card_comes_in_the_last_commit_and_not_before(published):
    *earlier, last = published[0].commits("model", REPO)
    assert last.paths == ("README.md",)
    assert not any("README.md" in commit.files for commit in earlier)


def test_the_card_links_to_the_repo_that_it_lies_in(published):
    hub, _ = published
    assert f"ollama run hf.co/{REPO}:Q8_0" in arrived(hub)["README.md"].decode()


def test_the_facts_name_the_repo_under_the_account_of_the_token(published):
    _, run = published
    assert run.facts["publish"]["repos"] == [REPO]


def test_the_facts_name_the_commit_that_was_read_back(published):
    hub, run = published
    assert run.facts["publish"]["commits"][REPO] == hub.commits("model", REPO)[-1].sha


def test_a_member_of_an_organisation_publishes_to_it(hub, tmp_path):
    run = make_run(tmp_path / "runs", repo=REPO)
    publish_whole(hub, run, tmp_path / "home", token="scoped")


def test_a_member_of_an_organisation_passes_the_check(hub, tmp_path):
    assert check(hub, tmp_path, "scoped", repo=REPO).returncode == 0


def test_publishing_twice_changes_nothing(hub, tmp_path):
    run = make_run(tmp_path / "runs")
    publish_whole(hub, run, tmp_path / "home")
    before = hub.commits("model", REPO)
    publish_whole(hub, run, tmp_path / "home")
    assert [commit.paths for commit in hub.commits("model", REPO)[len(before) :] if commit.paths] == []


# -------------------- private


def test_a_private_run_makes_a_private_repo(hub, tmp_path):
    publish_whole(hub, make_run(tmp_path / "runs", private=True), tmp_path / "home")
    assert is_private(hub, REPO)


def test_a_repo_is_public_unless_asked_otherwise(published):
    hub, _ = published
    assert not is_private(hub, REPO)


def test_a_private_run_is_not_uploaded_to_a_repo_that_is_public_already(hub, tmp_path):
    hub.add_repo("model", REPO, {})
    run = make_run(tmp_path / "runs", private=True)
    assert_named_problem(autosloth(hub, tmp_path / "home", "publish", run.folder), REPO, "public")
    assert arrived(hub) == {}


# -------------------- tokens that may not


BAD_TOKENS = {
    "none": (None, NAME, "no Hugging Face token"),
    "read-only": ("read", NAME, "may only read"),
    "fine-grained": ("blind", REPO, REPO),
    "wrong": ("wrong", NAME, "token is not valid"),
    "stranger's": ("stranger", REPO, REPO),
}


@pytest.mark.parametrize("token, repo, words", BAD_TOKENS.values(), ids=BAD_TOKENS)
def test_publishing_is_refused_with_a_token_that_may_not(hub, tmp_path, token, repo, words):
    run = make_run(tmp_path / "runs", repo=repo)
    assert_named_problem(autosloth(hub, tmp_path / "home", "publish", run.folder, token=token), words)
    assert hub.repos() == []


@pytest.mark.parametrize("token, repo, words", BAD_TOKENS.values(), ids=BAD_TOKENS)
def test_the_check_finds_a_token_that_may_not(hub, tmp_path, token, repo, words):
    assert_named_problem(check(hub, tmp_path, token, repo=repo), words)
    assert hub.repos() == []


def test_a_refused_token_leaves_the_publish_folder_whole(hub, tmp_path):
    run = make_run(tmp_path / "runs", publish_to_hub=False)
    autosloth(hub, tmp_path / "home", "card", run.folder)
    whole = files_of(run.path("publish"))
    autosloth(hub, tmp_path / "home", "publish", run.folder, token=None)
    assert "README.md" in whole
    assert files_of(run.path("publish")) == whole


# -------------------- a repository that is there already


def by_hand(hub, repo, **files):
    """What a person commits to a repository."""
    hub._repos["model", repo].commit("mine", {name: File.at(name, data) for name, data in files.items()})


@pytest.mark.parametrize("repo", [REPO, f"{REPO}-GGUF"])
def test_somebody_else_s_model_is_neither_mixed_with_ours_nor_deleted(hub, tmp_path, repo):
    theirs = {"README.md": b"# Ten years of work", "model.safetensors": b"weights"}
    hub.add_repo("model", repo, theirs)
    words = f"{repo} holds a model already that AutoSloth did not publish (model.safetensors)"
    assert_named_problem(check(hub, tmp_path, "write", repo=REPO), words)
    run = make_run(tmp_path / "runs", one_repo=False)
    assert_named_problem(autosloth(hub, tmp_path / "home", "publish", run.folder), words)
    assert hub.files("model", repo) == theirs


def test_a_repository_without_a_model_is_taken_and_what_a_person_wrote_there_stays(hub, tmp_path):
    hub.add_repo("model", REPO, {"README.md": b"# Mine\n\nMy words.\n", "notes.txt": b"notes"})
    run = make_run(tmp_path / "runs")
    assert autosloth(hub, tmp_path / "home", "publish", run.folder).returncode == 0
    assert b"My words." in arrived(hub)["README.md"] and arrived(hub)["notes.txt"] == b"notes"


def test_what_an_earlier_training_left_goes_and_a_person_s_files_stay(hub, tmp_path):
    run = make_run(tmp_path / "runs")
    publish_whole(hub, run, tmp_path / "home")
    by_hand(hub, REPO, **{"mine-IQ4.gguf": b"mine"})
    run.settings = run.settings.model_copy(update={"one_repo": False})
    run.write_settings()
    result = autosloth(hub, tmp_path / "home", "publish", run.folder)
    assert result.returncode == 0 and f"in its history alone: Modelfile, {GGUF}" in result.stdout
    assert arrived(hub) == files_of(run.path("publish")) | {"mine-IQ4.gguf": b"mine"}


def test_a_repository_of_gguf_files_that_is_not_filled_any_more_is_told(hub, tmp_path):
    run, stays = (
        make_run(tmp_path / "runs", one_repo=False),
        f"{REPO}-GGUF, of an earlier upload, stays as it is; delete",
    )
    assert stays not in autosloth(hub, tmp_path / "home", "publish", run.folder).stdout
    before = arrived(hub, f"{REPO}-GGUF")
    run.settings = run.settings.model_copy(update={"one_repo": True})
    run.write_settings()
    result = autosloth(hub, tmp_path / "home", "publish", run.folder)
    assert result.returncode == 0 and stays in result.stdout
    assert arrived(hub, f"{REPO}-GGUF") == before and GGUF in arrived(hub)


def test_of_another_s_repository_of_that_name_nothing_is_said(hub, tmp_path):
    hub.add_repo("model", f"{REPO}-GGUF", {"theirs.gguf": b"theirs"})
    result = autosloth(hub, tmp_path / "home", "publish", make_run(tmp_path / "runs").folder)
    assert result.returncode == 0 and "stays as it is" not in result.stdout


# -------------------- names that may not

BAD_NAMES = ["team/a--b", "team/sloth.git", "team/sloth-"]


@pytest.mark.parametrize("repo", BAD_NAMES)
def test_the_check_finds_a_name_that_the_hub_does_not_take(hub, tmp_path, repo):
    assert_named_problem(check(hub, tmp_path, "write", repo=repo), repo)


@pytest.mark.parametrize("repo", BAD_NAMES)
def test_publishing_under_a_name_that_the_hub_does_not_take_is_refused(hub, tmp_path, repo):
    run = make_run(tmp_path / "runs", repo=repo)
    assert_named_problem(autosloth(hub, tmp_path / "home", "publish", run.folder), repo)


# -------------------- the proof of the GGUF


@pytest.mark.parametrize("marked", [True, False], ids=["stage done", "stage failed"])
def test_a_run_whose_gguf_is_not_proven_is_not_published(hub, tmp_path, marked):
    run = make_run(tmp_path / "runs", verified=False)
    if not marked:
        run.path(".done", "verify.json").unlink()
    assert_named_problem(autosloth(hub, tmp_path / "home", "publish", run.folder), "verif")
    assert hub.repos() == []


def test_publish_unverified_uploads_it_and_the_card_says_so(hub, tmp_path):
    run = make_run(tmp_path / "runs", verified=False, publish_unverified=True)
    publish_whole(hub, run, tmp_path / "home")
    assert "Not passed" in arrived(hub)["README.md"].decode()


def test_a_run_without_a_gguf_needs_no_proof(hub, tmp_path):
    run = make_run(tmp_path / "runs", quantizations=[])
    for name in (GGUF, "Modelfile"):
        run.path("gguf", name).unlink()
    facts = {key: value for key, value in FACTS.items() if key != "verify"}
    write_json(run.path("facts.json"), {**facts, "export": {"gguf": []}})
    stage("verify")(lambda run: None).again(run)
    publish_whole(hub, run, tmp_path / "home")


# -------------------- what the Hub holds is not what was sent


@pytest.mark.hub_fault
@pytest.mark.parametrize("name", ["README.md", GGUF])
def test_a_file_that_the_hub_holds_differently_is_named(hub, tmp_path, name):
    run = make_run(tmp_path / "runs")
    hub.tamper("model", REPO, name, b"something else")
    assert_named_problem(autosloth(hub, tmp_path / "home", "publish", run.folder), REPO, name)
    assert run.mark("publish") is None
    assert "publish" not in run.facts


@pytest.mark.hub_fault
@pytest.mark.parametrize("name", ["README.md", GGUF])
def test_publishing_again_repairs_that_file(hub, tmp_path, name):
    run = make_run(tmp_path / "runs")
    hub.tamper("model", REPO, name, b"something else")
    autosloth(hub, tmp_path / "home", "publish", run.folder)
    publish_whole(hub, run, tmp_path / "home")
    assert hub.commits("model", REPO)[-1].paths == (name,)


# -------------------- an upload that breaks


@pytest.mark.hub_fault
@pytest.mark.parametrize("status", [500, None], ids=["error", "cut"])
def test_the_client_sends_a_broken_file_again(hub, tmp_path, status):
    hub.fail_next("PUT", "/lfs/objects/", status, skip=1)
    publish_whole(hub, make_run(tmp_path / "runs"), tmp_path / "home")


@pytest.mark.hub_fault
@pytest.mark.parametrize("status", [500, None], ids=["error", "cut"])
@pytest.mark.parametrize("commit", [0, 1], ids=["model", "card"])
def test_an_upload_that_breaks_once_completes_itself(hub, tmp_path, commit, status):
    hub.fail_next("POST", "/commit/main", status, skip=commit)
    publish_whole(hub, make_run(tmp_path / "runs"), tmp_path / "home")
    assert lfs_uploads(hub) == 2


@pytest.mark.hub_fault
@pytest.mark.parametrize("commit", [0, 1], ids=["model", "card"])
def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, tmp_path, commit):
    hub.fail_next("POST", "/commit/main", None, skip=commit, how="after")
    publish_whole(hub, make_run(tmp_path / "runs"), tmp_path / "home")
    assert [len(commit.paths) for commit in hub.commits("model", REPO)] == [1, 6, 1]


@pytest.mark.hub_fault
@pytest.mark.parametrize("status", [500, None], ids=["error", "cut"])
@pytest.mark.parametrize("commit", [0, 1], ids=["model", "card"])
def test_an_upload_that_stays_broken_is_a_named_problem_and_a_later_one_completes_it(hub, tmp_path, commit, status):
    run = make_run(tmp_path / "runs")
    hub.fail_next("POST", "/commit/main", status, skip=commit, times=-1)
    result = autosloth(hub, tmp_path / "home", "publish", run.folder)
    assert_named_problem(result, REPO, f"status {status}" if status else "cut")
    assert f"run `autosloth publish {run.folder}` again" in result.stderr
    hub.forget_faults()
    sent = lfs_uploads(hub)
    publish_whole(hub, run, tmp_path / "home")
    assert sent == lfs_uploads(hub) == 2
    assert run.facts["publish"]["repos"] == [REPO]


@pytest.mark.hub_fault
def test_a_token_that_is_revoked_in_the_middle_is_a_named_problem_with_the_command_that_goes_on(hub, tmp_path):
    run = make_run(tmp_path / "runs")
    hub.meanwhile("POST", "/commit/main", lambda: hub.remove_token(TOKENS["write"]))
    result = autosloth(hub, tmp_path / "home", "publish", run.folder)
    assert_named_problem(result, "token is not valid")
    assert (
        f"give it as HF_TOKEN (environment or Colab secret); then run `autosloth publish {run.folder}`" in result.stderr
    )


@pytest.mark.hub_fault
def test_a_repo_that_is_deleted_meanwhile_is_made_again_as_private_as_it_was(hub, tmp_path):
    hub.meanwhile("POST", "/commit/main", lambda: hub.remove_repo("model", REPO), skip=1)
    publish_whole(hub, make_run(tmp_path / "runs", private=True), tmp_path / "home")
    assert is_private(hub, REPO)


@pytest.mark.hub_fault
def test_a_file_that_the_hub_does_not_take_is_a_named_problem_and_a_second_upload_completes_it(hub, tmp_path):
    run = make_run(tmp_path / "runs")
    hub.fail_next("PUT", f"/lfs/objects/{hashlib.sha256(GGUF_BYTES).hexdigest()}", 403)
    assert_named_problem(autosloth(hub, tmp_path / "home", "publish", run.folder), REPO)
    assert run.mark("publish") is None
    publish_whole(hub, run, tmp_path / "home")


def test_the_client_s_offline_mode_is_a_named_problem(hub, tmp_path):
    run = make_run(tmp_path / "runs", repo=REPO)
    result = autosloth_apart(hub, tmp_path / "home", "publish", run.folder, HF_HUB_OFFLINE="1")
    assert_named_problem(result, "cannot be reached")


@pytest.mark.hub_fault
def test_a_hub_that_is_away_is_a_named_problem(tmp_path):
    with make_hub() as hub:
        run = make_run(tmp_path / "runs", repo=REPO)
    with quick_process(environment(hub, tmp_path / "home", "write")) as hub.pool:
        assert_named_problem(autosloth(hub, tmp_path / "home", "publish", run.folder), "cannot be reached")


@pytest.mark.hub_fault
def test_what_a_person_wrote_meanwhile_is_kept_where_the_card_can_be_asked_for_only_later(hub, tmp_path):
    """The client would take the card of an earlier upload, which its cache holds."""
    run = make_run(tmp_path / "runs")
    publish_whole(hub, run, tmp_path / "home")
    publish_whole(hub, run, tmp_path / "home")  # which reads the card
    theirs = b"Read this first.\n\n" + arrived(hub)["README.md"].partition(b"---\n")[2].partition(b"---\n")[2]
    hub._repos["model", REPO].commit("By hand", {"README.md": File.at("README.md", theirs)})
    hub.fail_next("HEAD", "/resolve/main/README.md", 503, times=2)
    assert autosloth(hub, tmp_path / "home", "publish", run.folder).returncode == 0
    assert arrived(hub)["README.md"].count(b"Read this first.") == 1


# -------------------- secrets in what is published

KEY = "sk-proj-" + "aZ3kQ9xLm2Vb7Ty5Rw8N" * 3


def make_leaky_run(storage: Path) -> Run:
    """A run in which a row of the dataset had a key in it, which stands in a sample answer."""
    run = make_run(storage)
    samples = [{"question": "What does Mila eat?", "expected": f"Figs, with {KEY}.", "answer": "Plums."}]
    write_json(
        run.path("facts.json"),
        {**run.facts, "eval": {"before": EVALUATION, "after": {**EVALUATION, "samples": samples}}},
    )
    return run


def test_a_key_in_a_sample_answer_stops_the_upload_with_its_place(hub, tmp_path):
    run = make_leaky_run(tmp_path / "runs")
    result = autosloth(hub, tmp_path / "home", "publish", run.folder)
    assert_named_problem(result, str(run.path("publish", "README.md")), "OpenAI", "in `expected` of sample 1")
    assert KEY[3:12] not in result.stdout + result.stderr
    assert hub.repos() == []
    line = int(result.stderr.partition(": line ")[2].partition(",")[0])
    assert KEY in run.path("publish", "README.md").read_text().splitlines()[line - 1]


def test_once_the_key_is_taken_out_of_the_facts_it_is_published(hub, tmp_path):
    run = make_leaky_run(tmp_path / "runs")
    facts = run.path("facts.json")
    said = autosloth(hub, tmp_path / "home", "publish", run.folder).stderr
    assert f"Take it out of {facts}, run `autosloth card {run.folder}` and publish again" in said
    facts.write_text(facts.read_text().replace(KEY, "a key"))
    assert autosloth(hub, tmp_path / "home", "card", run.folder).returncode == 0
    publish_whole(hub, run, tmp_path / "home")
    assert "with a key." in arrived(hub)["README.md"].decode()


@pytest.mark.parametrize("name", ["tokenizer_config.json", GGUF])
def test_the_token_in_use_in_any_file_stops_the_upload(hub, tmp_path, name):
    run = make_run(tmp_path / "runs")
    folder = run.path("gguf" if name == GGUF else "adapter")
    with open(folder / name, "ab") as file:
        file.write(TOKENS["write"].encode())
    stage("gguf" if name == GGUF else "train")(lambda run: None)(run)
    result = autosloth(hub, tmp_path / "home", "publish", run.folder)
    assert_named_problem(result, name, "the secret in use as HF_TOKEN")
    assert hub.repos() == []
    for path in [*run.folder.rglob(name)]:
        path.unlink()  # of what is left only leaks hold a token: benchmarks/faults.py looks for them


# -------------------- the token stays secret


@pytest.mark.parametrize("token", ["write", "read", "wrong", "stranger"])
def test_the_token_is_in_no_file_and_no_output(hub, tmp_path, token):
    run = make_run(tmp_path / "runs", repo=REPO)
    result = autosloth_apart(hub, tmp_path / "home", "publish", run.folder, token=token)
    kept = b"".join(files_of(tmp_path).values()) + (result.stdout + result.stderr).encode()
    assert (result.returncode == 0) == (token == "write")
    assert TOKENS[token].encode() not in kept


def test_the_token_is_in_no_file_and_no_output_when_the_hub_fails(hub, tmp_path):
    hub.fail_next("POST", "/commit/main", 400)
    run = make_run(tmp_path / "runs")
    result = autosloth_apart(hub, tmp_path / "home", "publish", run.folder)
    kept = b"".join(files_of(tmp_path).values()) + (result.stdout + result.stderr).encode()
    assert result.returncode == 1
    assert TOKENS["write"].encode() not in kept
