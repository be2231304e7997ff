"""Trackers: TensorBoard and Trackio are told what a training logs, a missing one is named beforehand, and one that fails ends nothing."""

from typing import get_args

import pytest

from autosloth.errors import ModelError
from autosloth.hub_copy import take
from autosloth.notebook.live import Interruption, progress_callback
from autosloth.run import Run
from autosloth.settings import SFTSettings
from autosloth.training import held_out, trackers, train

SECRET = "https://mila:word@example.org/rows.jsonl?token=hidden"


@pytest.fixture(scope="module")
def training(engine, finished):
    """training(folder, stop_after=None, **settings) -> run of six steps, told to trackers; of a run that is stopped, the rest."""
    rows = Run.open(finished).rows("eval")

    def start(folder, stop_after=None, **values):
        few = {"max_steps": 6, "save_steps": 2, "batch_size": 8, "eval_steps": 2, "warmup": 1, "run_name": "told"}
        run = Run.create(SFTSettings(model="demo", dataset="demo", storage=str(folder), **{**few, **values}))
        model, tokenizer = train.load_model(run.settings), train.load_tokenizer(run.settings)
        trainer = train.make_trainer(run, model, tokenizer, rows, rows, [progress_callback(Interruption())])
        on_the_way = held_out.HeldOut(run, trainer)
        trainer.add_callback(on_the_way.callback())
        if stop_after:
            measure = on_the_way.measure

            def killed(state):
                measure(state)
                if state.global_step == stop_after:
                    raise InterruptedError("killed")

            on_the_way.measure = killed
        train.go_on(run, trainer)
        return run

    return start


def test_tensorboard_shows_one_curve_of_a_training_that_was_killed(training, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(InterruptedError):
        training(tmp_path, report_to="tensorboard", save_steps=3, stop_after=4)  # before its own loss is logged
    run = training(tmp_path, report_to="tensorboard", save_steps=3)
    files = sorted(run.path("tensorboard").iterdir())
    assert len(files) == 2
    told = EventAccumulator(str(run.path("tensorboard"))).Reload()
    assert [event.step for event in told.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in told.Scalars("eval/loss")] == [2, 4, 6]
    text = told.Tensors("settings/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "run_name: told" in text and "eval_steps: 2" in text


def test_what_tensorboard_writes_on_is_copied_for_the_hub_and_not_linked(tmp_path):
    for folder in ("tensorboard", "data"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text("written")
    taken = take(tmp_path)
    assert (taken / "tensorboard" / "file").stat().st_nlink == 1 and (taken / "data" / "file").stat().st_nlink == 2


def test_trackio_is_told_without_a_network(training, tmp_path, monkeypatch):
    import trackio
    from trackio import sqlite_storage, utils

    for module in (utils, sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    training(tmp_path, report_to=["trackio"])
    runs = trackio.Api().runs(trackers.PROJECT)
    told = sqlite_storage.SQLiteStorage.get_logs(trackers.PROJECT, "told")
    assert [run.name for run in runs] == ["told"]
    assert [entry["train/global_step"] for entry in told if "train/loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert [entry["train/global_step"] for entry in told if "eval/loss" in entry] == [2, 4, 6]


def test_a_tracker_that_cannot_begin_is_said_once_and_the_training_goes_on(training, tmp_path, capsys):
    (tmp_path / "told").mkdir()
    (tmp_path / "told" / "tensorboard").write_text("a file, where its folder should be")
    run = training(tmp_path, report_to="tensorboard", max_steps=2)
    assert capsys.readouterr().out.count("tensorboard: it was not told what was logged") == 1
    assert [path.name for path in run.path("checkpoints").iterdir()] == ["checkpoint-2"]


def test_a_tracker_that_fails_on_the_way_is_given_up_and_counted(training, tmp_path, capsys, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    tried = []

    def add_scalar(self, name, value, step):
        tried.append(step)
        raise ConnectionError("https://mila:word@example.org is away")

    monkeypatch.setattr(SummaryWriter, "add_scalar", add_scalar)
    training(tmp_path, report_to="tensorboard", eval_steps=0)
    said = capsys.readouterr().out
    assert tried == [1, 2, 3] and "tensorboard: failed 3 times; not all of the training is there" in said
    assert said.count("it was not told what was logged (ConnectionError)") == 1 and "word" not in said


def test_of_settings_no_address_with_a_key_in_it_is_told():
    told = trackers.public_settings(SFTSettings(model="demo", dataset=[{"path": SECRET}, {"path": "demo"}]))
    assert [part["path"] for part in told["dataset"]] == ["https://example.org/rows.jsonl", "demo"]
    assert (
        trackers.public_settings(SFTSettings(model="demo", dataset=SECRET))["dataset"]
        == "https://example.org/rows.jsonl"
    )


def test_transformers_has_a_callback_for_each_tracker(engine):
    from transformers.integrations import INTEGRATION_TO_CALLBACK

    kinds = get_args(get_args(SFTSettings.model_fields["report_to"].annotation)[0])
    assert set(kinds) == {"tensorboard", "trackio", "wandb", "mlflow"} <= INTEGRATION_TO_CALLBACK.keys()


def test_a_tracker_that_is_not_installed_is_named_with_the_line_that_installs_it():
    with pytest.raises(
        ModelError, match=r"names wandb and mlflow, which are not installed.*`pip install wandb mlflow`"
    ):
        trackers.check_trackers(SFTSettings(model="demo", report_to=["tensorboard", "wandb", "mlflow"]))


def test_weights_and_biases_without_a_key_is_named_before_it_waits_for_one(monkeypatch, tmp_path):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: name)
    for variable in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = SFTSettings(model="demo", report_to=["wandb"])
    with pytest.raises(ModelError, match=r"has no key here.*Set WANDB_API_KEY"):
        trackers.check_trackers(settings)
    for variable, value in (("WANDB_MODE", "offline"), ("WANDB_API_KEY", "0" * 40)):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            trackers.check_trackers(settings)
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password " + "0" * 40)
    (tmp_path / ".netrc").chmod(0o600)
    trackers.check_trackers(settings)


@pytest.mark.parametrize("where, line", [("colab", "`%load_ext tensorboard` and `%tensorboard --logdir runs/told/tensorboard`"), ("elsewhere", "by `tensorboard --logdir runs/told/tensorboard`")])  # fmt: skip
def test_how_tensorboard_is_opened_is_said_beforehand(monkeypatch, capsys, where, line):
    monkeypatch.setattr(trackers, "place", lambda: where)
    trackers.check_trackers(SFTSettings(model="demo", run_name="told", report_to="tensorboard"))
    assert line in capsys.readouterr().out
