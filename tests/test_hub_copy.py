"""The private copy of a run: whose it is, which of two states goes on, and that no training ends for it."""

import errno
import json
import shutil
from pathlib import Path

import pytest
from support.hub_server import File, HubServer, Reply
from support.locks import released

from autosloth import hub_client, hub_copy
from autosloth.check import check_publishing
from autosloth.errors import HubError
from autosloth.hub_copy import ABOUT, FETCHED, NOTE, STATE, bring_back, copy_name, drop, finish, keep, kept, put_in
from autosloth.output import counted
from autosloth.publish import refuse_foreign_token, repositories, upload
from autosloth.run import Run, lock
from autosloth.settings import SFTSettings

COPY, TOKEN = "team/short-checkpoints", "hf_" + "Zq7x" * 8
TWO, FOUR = (f"checkpoints/checkpoint-{n}/adapter_model.safetensors" for n in (2, 4))
RUN = {"settings.json": b"{}", ".done/data.json": b"{}", TWO: b"two"}
THEIRS = {"README.md": b"# My model", "model.safetensors": b"mine"}


@pytest.fixture
def hub(monkeypatch):
    """A Hub that this process itself talks to, without a pause between tries."""
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub_copy.account_of.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with HubServer() as hub:
        hub.add_token(TOKEN, user="team")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for module in (hub_copy, hub_client, repositories, upload):
            monkeypatch.setattr(module, "hub_api", lambda: HfApi(endpoint=hub.url))
        yield hub


def settings_of(home, **more):
    return SFTSettings(
        **{"model": "demo", "dataset": "demo", "run_name": "short", "storage": str(home), "hub_checkpoints": True}
        | more
    )


def fill(folder, files=RUN):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def send(settings, **files):
    """Let the run folder hold these too, and send it; what was said of it."""
    fill(settings.folder, RUN | files)
    keep(settings, wait=True)
    finish(settings)


def start(settings):
    settings.folder.mkdir(parents=True, exist_ok=True)
    bring_back(settings)


def add_copy(hub, **files):
    hub.add_repo("model", COPY, {**RUN, "README.md": ABOUT.format(name="short", state="ab12").encode(), **files}, private=True)  # fmt: skip


def has_copy(hub):
    return ("model", COPY) in hub.repos()


# -------------------- whose it is


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_that_is_no_copy_is_not_read_nor_written_nor_deleted(hub, tmp_path, capsys, private):
    hub.add_repo("model", COPY, THEIRS, private=private)
    settings = settings_of(tmp_path, publish_to_hub=True, repo="short")
    for refused in (start, refuse_foreign_token):
        with pytest.raises(HubError, match=f"{COPY} is no copy of a run"):
            refused(settings)
    send(settings)
    drop(settings)
    assert hub.files("model", COPY) == THEIRS and len(hub.commits("model", COPY)) == 1
    assert capsys.readouterr().out.count(f"{COPY} is no copy of a run") == 2
    assert (settings.folder / TWO).read_bytes() == b"two"


def test_a_copy_is_written_brought_back_and_deleted(hub, tmp_path, capsys):
    one, two = settings_of(tmp_path / "one"), settings_of(tmp_path / "two", publish_to_hub=True)
    send(one)
    send(one, **{FOUR: b"four"})
    assert len(hub.commits("model", COPY)) == 1  # squashed
    start(two)
    assert (two.folder / FOUR).read_bytes() == b"four" and not (two.folder / "README.md").exists()
    start(two)  # which is its own now
    drop(two)
    assert not has_copy(hub), capsys.readouterr().out


def test_what_another_folder_wrote_or_a_person_made_public_is_not_deleted(hub, tmp_path, capsys):
    settings = settings_of(tmp_path, publish_to_hub=True)
    add_copy(hub)
    drop(settings)
    assert has_copy(hub) and "stays (it is public, or was written from another folder)" in capsys.readouterr().out
    hub.remove_repo("model", COPY)
    send(settings)
    hub._repos["model", COPY].private = False
    drop(settings)
    assert has_copy(hub) and "stays" in capsys.readouterr().out


# -------------------- which of two goes on


def test_a_folder_with_a_training_and_another_copy_is_refused(hub, tmp_path):
    settings = settings_of(tmp_path)
    add_copy(hub)
    fill(settings.folder, {"settings.json": b"{}", FOUR: b"four"})
    with pytest.raises(HubError, match=f"holds a run .checkpoints. and {COPY} on the Hub another") as refused:
        start(settings)
    assert "move the folder away" in refused.value.todo and "delete that repository" in refused.value.todo
    assert (settings.folder / FOUR).read_bytes() == b"four"
    hub.remove_repo("model", COPY)
    start(settings)


def test_a_folder_without_a_training_is_filled_from_the_copy(hub, tmp_path):
    settings = settings_of(tmp_path)
    add_copy(hub)
    fill(settings.folder, {"settings.json": b"old", "facts.json": b"{}"})
    start(settings)
    assert {name: (settings.folder / name).read_bytes() for name in RUN} == RUN


def test_the_check_tells_which_of_folder_and_copy_goes_on_and_changes_nothing(hub, tmp_path, capsys):
    one, two = settings_of(tmp_path / "one"), settings_of(tmp_path / "two")
    check_publishing(one)
    assert "hub" not in capsys.readouterr().out  # nothing is there yet
    send(one)
    capsys.readouterr()
    held, commits = hub.files("model", COPY), hub.commits("model", COPY)
    for settings, told in ((one, f"it is of {one.folder}, which goes on"), (two, f"{two.folder} is filled from it")):
        check_publishing(settings)
        said = capsys.readouterr().out
        assert said == f"check: {COPY} on the Hub holds a copy of this run ({counted(len(RUN) + 1, 'file')}): {told}\n"
    assert not two.folder.exists() and (hub.files("model", COPY), hub.commits("model", COPY)) == (held, commits)
    fill(two.folder, {"settings.json": b"{}", FOUR: b"four"})
    with pytest.raises(HubError) as by_run:
        start(two)
    with pytest.raises(HubError, match=f"holds a run .checkpoints. and {COPY} on the Hub another") as by_check:
        check_publishing(two)
    assert str(by_check.value) == str(by_run.value)


def test_an_older_folder_does_not_overwrite_a_newer_copy(hub, tmp_path):
    settings = settings_of(tmp_path / "one")
    send(settings)
    shutil.copytree(tmp_path / "one", tmp_path / "old")
    send(settings, **{FOUR: b"four"})
    with pytest.raises(HubError, match="holds a run"):
        start(settings_of(tmp_path / "old"))


def test_of_two_machines_the_second_keeps_nothing_and_says_so(hub, tmp_path, capsys):
    one, two = settings_of(tmp_path / "one"), settings_of(tmp_path / "two")
    send(one)
    start(two)
    send(one, **{FOUR: b"four"})
    capsys.readouterr()
    send(two, **{FOUR: b"other"})
    assert (
        "not kept this time, the training goes on. Another machine writes to the same copy" in capsys.readouterr().out
    )
    assert hub.files("model", COPY)[FOUR] == b"four"


@pytest.mark.parametrize("status", [None, 504])
def test_a_lost_answer_is_no_other_machine(hub, tmp_path, capsys, status):
    settings = settings_of(tmp_path)
    send(settings)
    hub.fail_next("POST", "/commit/", status, how="after")
    send(settings, **{FOUR: b"four"})
    hub.fail_next("POST", "/super-squash/", status, how="after")
    send(settings, **{FOUR: b"more"})
    send(settings, **{FOUR: b"last"})
    start(settings)
    assert "not kept" not in capsys.readouterr().out and hub.files("model", COPY)[FOUR] == b"last"


@pytest.mark.parametrize("sent_before", [True, False])
def test_of_two_machines_that_write_at_once_the_second_keeps_nothing_and_says_so(hub, tmp_path, capsys, sent_before):
    def overtake():
        theirs = ABOUT.format(name="short", state="ab12").encode()
        hub._repos["model", COPY].commit("theirs", {"README.md": File.at("README.md", theirs)})

    settings = settings_of(tmp_path)
    if sent_before:
        send(settings)
    hub.meanwhile("POST", "/commit/", overtake)
    send(settings, **{FOUR: b"four"})
    assert f"Another machine writes to the same copy, {COPY}." in capsys.readouterr().out
    assert hub.commits("model", COPY)[-1].message == "theirs"


def test_a_process_that_is_killed_after_the_commit_knows_its_copy(hub, tmp_path):
    settings = settings_of(tmp_path)
    send(settings)
    before = (settings.folder / NOTE).read_text()
    hub.fail_next("POST", "/commit/", 400, how="after")  # and it never hears that all went well
    send(settings, **{FOUR: b"four"})
    assert (settings.folder / NOTE).read_text() != before and FOUR in hub.files("model", COPY)
    start(settings)


def test_newer_files_without_their_settings_stay(hub, tmp_path):
    settings = settings_of(tmp_path)
    send(settings)
    (settings.folder / "settings.json").unlink()
    (settings.folder / TWO).write_bytes(b"newer")
    start(settings)
    (settings.folder / NOTE).unlink()
    with pytest.raises(HubError, match="holds a run"):
        start(settings)
    assert (settings.folder / TWO).read_bytes() == b"newer"


def test_the_run_is_locked_before_its_copy_is_brought_back(hub, tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr("autosloth.run.lock", lambda folder: (order.append("lock"), lock(folder)))
    monkeypatch.setattr("autosloth.run.bring_back", lambda settings: order.append("back"))
    released(Run.create(settings_of(tmp_path)))
    assert order[:2] == ["lock", "back"]


def test_a_copy_that_was_half_put_in_is_put_in_whole(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "checkpoints").symlink_to(other)
    fill(tmp_path / FETCHED, RUN | {NOTE: b"{}"})
    fill(tmp_path, {"checkpoints/checkpoint-2/config.json": b"{}"})
    put_in(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in RUN} == RUN and not (tmp_path / FETCHED).exists()
    assert (other / "checkpoint-2" / "config.json").exists()


@pytest.mark.parametrize("name, words", [("../evil", "holds a file that lies in no run folder: ../evil"), ("settings.json", "no whole copy")])  # fmt: skip
def test_a_copy_that_is_not_whole_or_leads_elsewhere_is_refused(hub, tmp_path, name, words):
    add_copy(hub, **{"../evil": b"x"} if name == "../evil" else {})
    if name == "settings.json":
        hub.remove_repo("model", COPY)
        hub.add_repo("model", COPY, {"README.md": ABOUT.format(name="short", state="ab12").encode(), TWO: b"two"}, private=True)  # fmt: skip
    with pytest.raises(HubError, match=words):
        start(settings_of(tmp_path / "runs"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# -------------------- names, tokens, answers


@pytest.mark.parametrize("name, words", [("a" * 86, "too long.*98 characters, of 96"), ("a--b", "cannot be the name")])
def test_a_name_that_the_hub_does_not_take_is_refused(name, words):
    with pytest.raises(HubError, match=words) as refused:
        copy_name(settings_of("runs", run_name=name, repo="team/x"))
    assert "`run_name`" in refused.value.todo


def test_a_token_that_is_missing_or_wrong_or_a_hub_that_is_down_is_a_named_problem(hub, monkeypatch):
    settings = settings_of("runs")
    hub.fail_next("GET", "/api/whoami", 503)
    refuse_foreign_token(settings)  # at the second try
    hub.fail_next("GET", "/api/whoami", 503, times=-1)
    with pytest.raises(HubError, match="status 503"):
        refuse_foreign_token(settings)
    hub.forget_faults()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="the token is not valid"):
        refuse_foreign_token(settings)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(HubError, match="There is no Hugging Face token"):
        refuse_foreign_token(settings)


def test_an_account_that_cannot_be_asked_for_is_asked_four_times_and_ends_no_training(hub, tmp_path, capsys):
    hub.fail_next("GET", "/api/whoami", 503, times=-1)
    send(settings_of(tmp_path))
    assert "not kept this time" in capsys.readouterr().out and len(hub.requests) == 4
    hub.forget_faults()
    send(settings_of(tmp_path))
    assert has_copy(hub) and sum("whoami" in path for _, path in hub.requests) == 5


PAGE = Reply(200, b"<html>Welcome</html>", {"Content-Type": "text/html"})
ODD = [PAGE, *(Reply(200, json.dumps(odd).encode(), {"Content-Type": "application/json"}) for odd in ([], {}, "x", None))]  # fmt: skip


@pytest.mark.parametrize("answer", ODD, ids=lambda answer: answer.body.decode())
def test_answers_of_another_form_end_no_training(hub, tmp_path, capsys, monkeypatch, answer):
    settings = settings_of(tmp_path, publish_to_hub=True)
    send(settings)
    monkeypatch.setattr(hub, "_answer", lambda *request: answer)
    capsys.readouterr()
    send(settings)
    drop(settings)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "not kept this time, the training goes on" in said[0] and "It can be deleted" in said[1]
    with pytest.raises(HubError, match="could not be read"):
        start(settings_of(tmp_path / "other"))


def test_a_full_disk_ends_no_training(hub, tmp_path, capsys, monkeypatch):
    def full(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    settings = settings_of(tmp_path)
    fill(settings.folder)
    monkeypatch.setattr("os.link", full)
    monkeypatch.setattr("shutil.copyfile", full)
    keep(settings, wait=True)
    assert "not kept this time, the training goes on. ([Errno 28] No space left" in capsys.readouterr().out
    assert not (settings.folder / hub_copy.HALF_COPIED).exists()


def test_files_behind_a_link_are_kept_and_no_circle_is_walked(tmp_path):
    elsewhere, folder = tmp_path / "disk", tmp_path / "run"
    fill(elsewhere, {"checkpoint-2/model.safetensors": b"two"})
    fill(folder, {"settings.json": b"{}", "README.md": b"mine", ".x.partial/y": b"", "gguf/x.gguf": b""})
    (folder / "checkpoints").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(folder)
    found = [path.relative_to(folder).as_posix() for path in kept(folder)]
    assert found == ["checkpoints/checkpoint-2/model.safetensors", "settings.json"]


def test_the_state_of_a_copy_is_a_new_one_each_time(tmp_path):
    fill(tmp_path)
    states = {STATE.search(Path(hub_copy.take(tmp_path), "README.md").read_text())[1] for _ in range(2)}
    assert len(states) == 2
