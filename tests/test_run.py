"""The run folder: a stage tells its own time, and what it waited for besides; a training is never overwritten by another."""

import errno
import shutil

import pytest
from support.toy_road import NEVER_ENDS, card, data, follow, gguf, settings_of, train

from autosloth import run as runs
from autosloth.errors import Interrupted, SettingsError, StorageError, VerifyError
from autosloth.run import Run, read_json, stage, waiting_for, write_json
from autosloth.settings import ROADS, DPOSettings, SFTSettings


def test_what_a_stage_waits_for_is_not_its_own_time(tmp_path, capsys, monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr(runs.time, "perf_counter", lambda: seconds[0])

    def work(span):
        seconds[0] += span

    @stage("busy")
    def busy(run):
        work(3)
        with waiting_for("llama.cpp to compile"):
            work(240)
        work(4)

    @stage("idle")
    def idle(run):
        work(1)

    run = Run.create(SFTSettings(model="demo", dataset="demo", storage=str(tmp_path)))
    busy(run)
    idle(run)
    said = capsys.readouterr().out.splitlines()
    assert said == ["busy: done in 7.0 s, besides 4 min for llama.cpp to compile", "idle: done in 1.0 s"]
    assert read_json(run.path(".done", "busy.json"))["seconds"] == 7


@pytest.mark.parametrize("road", ROADS)
def test_the_stages_of_a_road_are_known_by_their_names(road):
    from autosloth.roads import stages

    assert tuple(stage.stage for stage in stages(road) if hasattr(stage, "stage")) == runs.STAGES


def test_what_a_stage_failed_with_is_kept_until_it_is_begun_again(tmp_path):
    @runs.stage("verify", after=("gguf",))
    def failing(run):
        raise VerifyError("It is wrong.", "Do this.")

    run = follow(settings_of(tmp_path))
    with pytest.raises(VerifyError):
        failing(run)
    assert str(run.failure("verify")) == "It is wrong. Do this."

    @runs.stage("later", after=("verify",))
    def later(run):
        raise AssertionError

    with pytest.raises(SettingsError, match=r"The stage `verify` of .*mine failed: It is wrong. Do this."):
        later(run)
    gguf.again(run)
    assert run.failure("verify") is None


def befores(folder):
    return sorted((folder / "mine" / "before").glob("*"))


@pytest.mark.parametrize("road, other, told", [(SFTSettings, {"model": "n"}, "another model: m, not n"), (SFTSettings, {"dataset": "e.json"}, "another dataset: d.json, not e.json"), (DPOSettings, {}, "another road: sft, not dpo")])  # fmt: skip
def test_a_training_of_something_else_is_never_overwritten(tmp_path, road, other, told):
    follow(settings_of(tmp_path))
    (tmp_path / "mine-2").mkdir()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SettingsError, match=f"{told}.*`mine-3`"):
        Run.create(settings_of(tmp_path, road, **other))
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}


def test_what_is_trained_anew_is_told_and_what_was_there_is_kept(tmp_path):
    follow(settings_of(tmp_path))
    changed = settings_of(tmp_path, learning_rate=1e-4)
    assert runs.changes(changed) == f"run: learning_rate 0.001 -> 0.0001: train, gguf, card again; what is there goes to {tmp_path}/mine/before, where its adapter, figures and card stay"  # fmt: skip
    run = follow(changed, data, train, gguf)
    (aside,) = befores(tmp_path)
    old = Run.open(aside)
    assert (old.settings.learning_rate, old.facts["train"]["rate"], old.path("gguf", "file").read_text()) == (1e-3, 1e-3, "0.001")  # fmt: skip
    card(run)  # now the new one is whole
    assert {path.name for path in aside.iterdir()} == {"adapter", "settings.json", "facts.json", ".done", "README.md"}
    assert (aside / "adapter" / "weights").read_text() == "0.001"
    assert run.path("adapter", "weights").read_text() == run.path("gguf", "file").read_text() == "0.0001"
    assert run.facts["train"]["rate"] == 1e-4 and runs.changes(changed) is None
    gguf(old)  # of the adapter that was kept its file can be made again
    card(run)  # and stays there when the card is written once more
    assert old.path("gguf", "file").read_text() == "0.001"


def test_what_was_made_by_hand_of_a_run_before_stays_when_the_new_one_is_whole(tmp_path):
    follow(settings_of(tmp_path))
    run = follow(settings_of(tmp_path, learning_rate=1e-4), data, train)
    (aside,) = befores(tmp_path)
    gguf.again(Run.open(aside))
    gguf(run), card(run)
    assert (aside / "gguf" / "file").read_text() == "0.001"


def test_a_folder_that_a_kill_left_without_anything_is_cleared(tmp_path):
    run = follow(settings_of(tmp_path))
    for name in ("husk", "mine"):
        (run.path("before", name, ".done")).mkdir(parents=True)
        for file in ("settings.json", "facts.json", ".uncleared", *(["notes.txt"] if name == "mine" else [])):
            run.path("before", name, file).touch()
    card.again(run)
    assert [path.name for path in befores(tmp_path)] == ["mine"]


def test_a_before_on_another_disk_takes_what_was_there(tmp_path, monkeypatch):
    def rename(old, new):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    run = follow(settings_of(tmp_path))
    run.path("verify").mkdir()
    monkeypatch.setattr("os.rename", rename)
    follow(settings_of(tmp_path, learning_rate=1e-4), data, train)
    (aside,) = befores(tmp_path)
    assert (aside / "adapter" / "weights").read_text() == (aside / "gguf" / "file").read_text() == "0.001"
    assert not (aside / "verify").exists() and run.path("adapter", "weights").read_text() == "0.0001"


def test_a_training_that_was_begun_is_kept_too_and_goes_on_where_it_stood(tmp_path):
    follow(settings_of(tmp_path))
    endless = settings_of(tmp_path, learning_rate=NEVER_ENDS)
    for _ in range(2):  # the second time it goes on: nothing is set aside again
        with pytest.raises(Interrupted):
            follow(endless)
        assert len(befores(tmp_path)) == 1 and (tmp_path / "mine" / "checkpoints" / "step").is_file()
    assert read_json(tmp_path / "mine" / "facts.json").keys() == {"data"}
    follow(settings_of(tmp_path))
    assert len(befores(tmp_path)) == 2


def test_what_the_user_keeps_in_a_run_folder_stays_there(tmp_path):
    run = follow(settings_of(tmp_path))
    run.path("notes.txt").write_text("mine")
    follow(settings_of(tmp_path, run_name="inner", storage=str(run.folder)))
    follow(settings_of(tmp_path, learning_rate=1e-4))
    assert (
        run.path("notes.txt").read_text() == "mine" and run.path("inner", "adapter", "weights").read_text() == "0.001"
    )
    assert len(befores(tmp_path)) == 1


def test_a_file_without_its_adapter_counts_as_a_run_too(tmp_path):
    run = follow(settings_of(tmp_path))
    for name in ("adapter", "checkpoints"):
        shutil.rmtree(run.path(name), ignore_errors=True)
    with pytest.raises(SettingsError, match="another dataset"):
        Run.create(settings_of(tmp_path, dataset="e.json"))


def test_work_that_fails_before_a_stage_begins_leaves_the_run_as_it_was(tmp_path):
    @runs.stage("data", facts=("data",), outputs=("data/rows",), prepares=lambda run: 1 / 0, sets_aside=True)
    def failing(run, made):
        raise AssertionError

    run = follow(settings_of(tmp_path))
    files = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    with pytest.raises(ZeroDivisionError):
        failing(run)
    assert files == {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}


def test_settings_json_tells_what_lies_there_until_a_stage_begins_anew(tmp_path):
    @runs.stage("data", reads=("seed",), facts=("data",), outputs=("data/rows",), prepares=lambda run: 1 / 0, sets_aside=True)  # fmt: skip
    def failing(run, made):
        raise AssertionError

    follow(settings_of(tmp_path))
    with pytest.raises(ZeroDivisionError):
        follow(settings_of(tmp_path, seed=77, learning_rate=1e-4), failing)
    assert Run.open(tmp_path / "mine").settings == settings_of(tmp_path)
    with pytest.raises(Interrupted):
        follow(settings_of(tmp_path, learning_rate=NEVER_ENDS))
    (aside,) = befores(tmp_path)
    assert Run.open(aside).settings == settings_of(tmp_path)
    assert Run.open(tmp_path / "mine").settings.learning_rate == NEVER_ENDS


def test_a_stage_of_other_settings_is_refused_however_early_it_came(tmp_path):
    run = follow(settings_of(tmp_path))
    other = Run(run.folder, settings_of(tmp_path, dataset="e.json"))
    with pytest.raises(SettingsError, match=r"The stage `data` of .* was done with other settings \(dataset\)"):
        card(other)


def test_the_run_itself_is_no_adapter_to_start_from(tmp_path):
    run = follow(settings_of(tmp_path))
    with pytest.raises(SettingsError, match="the run that is to be trained"):
        Run.create(settings_of(tmp_path, adapter=str(run.folder)))


def test_a_free_name_is_short_enough_to_be_taken(tmp_path):
    (tmp_path / ("a" * 95)).mkdir()
    name = runs.free_name(tmp_path / ("a" * 95))
    assert name == "a" * 93 + "-2" and SFTSettings.load({"model": "demo", "run_name": name})


def test_rows_that_changed_on_the_disk_set_the_training_aside(tmp_path):
    run = follow(settings_of(tmp_path))
    (tmp_path / "d.json").write_text("others")
    follow(settings_of(tmp_path))
    (aside,) = befores(tmp_path)
    assert read_json(aside / "facts.json")["data"]["rows"] == "nothing" and run.facts["data"]["rows"] == "others"


def test_another_file_of_the_same_training_is_made_without_moving_anything(tmp_path):
    follow(settings_of(tmp_path))
    changed = settings_of(tmp_path, quantizations=["f16"])
    assert runs.changes(changed) == "run: quantizations ['q8_0'] -> ['f16']: gguf, card again"
    follow(changed)
    assert not befores(tmp_path)


def test_a_file_that_cannot_be_made_anew_leaves_the_old_one(tmp_path):
    run = follow(settings_of(tmp_path))
    run.path("full").touch()
    with pytest.raises(StorageError, match="No space is left"):
        follow(settings_of(tmp_path, quantizations=["f16"]))
    assert run.path("gguf", "file").is_file() and not run.mark("gguf") and not list(run.folder.rglob(".*.partial"))
    with pytest.raises(SettingsError, match=r"The stage `gguf` of .* failed: "):
        card(run)
    run.path("full").unlink()
    assert follow(settings_of(tmp_path, quantizations=["f16"])).mark("gguf")


def test_what_changed_on_the_disk_is_told_beforehand(tmp_path):
    run = follow(settings_of(tmp_path))
    same = settings_of(tmp_path)
    assert runs.changes(same, data) is None
    run.path("gguf", "file").unlink()
    assert runs.changes(same, data) == "run: gguf/file is missing: gguf, card again"
    run.path("adapter", "weights").unlink()
    assert runs.changes(same, data) == "run: adapter/weights is missing, gguf/file is missing: train, gguf, card again"
    (tmp_path / "d.json").write_text("others")
    told = runs.changes(same, data)
    assert told.startswith("run: the content of what `data` reads changed: data, train, gguf, card again; what is there goes to")  # fmt: skip


def test_before_a_training_anything_may_change(tmp_path):
    follow(settings_of(tmp_path), data)
    other = settings_of(tmp_path, model="n", dataset="e.json")
    assert runs.changes(other) is None
    follow(other)
    assert not befores(tmp_path)


@pytest.mark.parametrize("name, stage", [("data/rows", "data"), ("adapter/weights", "train")])
def test_zeros_where_a_disk_lost_a_part_of_a_file_are_told_and_it_is_made_again(tmp_path, name, stage):
    run = follow(settings_of(tmp_path))
    kept = run.path(name).read_bytes()
    run.path(name).write_bytes(b"\0" * len(kept))
    with pytest.raises(StorageError, match=f"{name} has another content than when the stage `{stage}` was done.*Run `autosloth sft "):  # fmt: skip
        (gguf if stage == "train" else train).again(run)
    follow(settings_of(tmp_path))
    assert run.path(name).read_bytes() == kept
    runs.refuse_altered(run, stage)


def test_zeros_in_the_merged_model_are_told_and_it_is_made_again(tmp_path):
    @runs.stage("merge", after=("train",), outputs=("merged",), replaces=True)
    def merge(run):
        with run.replaced("merged") as folder:
            folder.joinpath("model.safetensors").write_text("weights")

    @runs.stage("card", after=("merge",))
    def later(run):
        raise AssertionError

    run = follow(settings_of(tmp_path), data, train, merge)
    weights = run.path("merged", "model.safetensors")
    weights.write_bytes(b"\0" * 7)
    with pytest.raises(StorageError, match=r"merged/model\.safetensors has another content .*Run `autosloth export "):
        later(run)
    merge(run)
    assert weights.read_text() == "weights"


@pytest.mark.parametrize("told", [{}, [], None, {"rate": {}}, {"rate": None}, {"other": 1e-3}], ids=str)
def test_a_stage_whose_facts_were_lost_is_not_done_and_makes_them_again(tmp_path, capsys, told):
    run = follow(settings_of(tmp_path))
    whole = run.facts
    write_json(run.path("facts.json"), whole | {"train": told})
    with pytest.raises(SettingsError, match=r"facts\.json: train.* is missing, which the stage `train` wrote.*Run `autosloth sft "):  # fmt: skip
        gguf.again(run)
    assert runs.changes(run.settings).endswith("is missing: train, gguf, card again")
    capsys.readouterr()
    assert follow(settings_of(tmp_path)).facts == whole and not befores(tmp_path)
    said = capsys.readouterr().out
    assert (
        "data: done already" in said and "train: `facts.json` does not tell train" in said and "card: done in" in said
    )


def test_more_facts_than_a_stage_measured_and_other_figures_leave_it_done(tmp_path, capsys):
    run = follow(settings_of(tmp_path))
    write_json(run.path("facts.json"), run.facts | {"train": {"rate": 5, "note": "mine"}, "mine": []})
    follow(settings_of(tmp_path))
    assert capsys.readouterr().out.count("done already, skipped") == 4


def test_facts_in_a_list_are_held_entry_by_entry(tmp_path):
    @stage("rounds", facts=("rounds",))
    def play(run):
        run.put("rounds", [{"steps": 3}, {"steps": 2, "stopped": "no gain"}])

    run = Run.create(settings_of(tmp_path))
    play(run)
    for lost in ([], {}, [{"steps": 3}], [{"steps": 3}, {}], [{"steps": 3}, 2], [3, 2]):
        write_json(run.path("facts.json"), {"rounds": lost})
        assert run.lost("rounds")
    play(run)
    assert not run.lost("rounds") and [each["steps"] for each in run.facts["rounds"]] == [3, 2]


def test_a_setting_that_came_later_and_is_at_its_default_leaves_what_is_done_done(tmp_path, capsys):
    done = []
    old, new = (stage("toy", reads=reads)(lambda run: done.append(run.settings.patience)) for reads in (["seed"], ["seed", "patience"]))  # fmt: skip
    old(Run.create(settings_of(tmp_path)))
    for _ in range(2):
        new(Run.create(settings_of(tmp_path)))
    assert done == [0] and capsys.readouterr().out.count("toy: done already, skipped") == 2
    new(Run.create(settings_of(tmp_path, patience=3)))
    new(Run.create(settings_of(tmp_path, patience=3)))
    new(Run.create(settings_of(tmp_path)))
    assert done == [0, 3, 0]
