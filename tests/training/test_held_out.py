"""The held-out loss while it trains: what is kept by it, what stops by it, and that it changes nothing else, also of a run that was killed."""

import functools
import shutil

import pytest

from autosloth.data.stage import prepare_data
from autosloth.hub_copy import kept
from autosloth.notebook.live import held_out_losses, kept_lines, panel_html
from autosloth.run import Run, file_hash
from autosloth.settings import ROADS, DPOSettings, SFTSettings
from autosloth.training import checkpoints, dpo, held_out, train

LOSSES = ("held_out", "kept", "measuring", "losses")
TRAIN = {"sft": train.train_adapter, "dpo": dpo.train_preferences}
FEW = {
    "model": "demo",
    "dataset": "demo",
    "run_name": "short",
    "max_steps": 6,
    "save_steps": 2,
    "warmup": 1,
    "batch_size": 8,
}
RISING = {"learning_rate": 0.03, "max_steps": 8, "warmup": 0, "scheduler": "constant", "eval_steps": 1}


@pytest.fixture(scope="module")
def start(engine, base, tmp_path_factory):
    """start(folder, road, **settings) -> run of a few steps, on rows that were prepared once, to be trained."""

    @functools.cache
    def prepared(road):
        storage = str(tmp_path_factory.mktemp(road))
        run = Run.create(ROADS[road](**FEW, storage=storage, eval_answers=1, max_new_tokens=4))
        prepare_data(run)
        return run.folder

    def copied(folder, road="sft", **values):
        values = {**FEW, "eval_answers": 1, "max_new_tokens": 4, "storage": str(folder), **values}
        shutil.copytree(prepared(road), folder / "short")
        return Run.create(ROADS[road](**values))

    return copied


@pytest.fixture(scope="module")
def rising(start, tmp_path_factory):
    """A finished run whose held-out loss falls and then rises."""
    return trained(start(tmp_path_factory.mktemp("rising"), **RISING))


def trained(run):
    """A run that measures by all held-out rows, whatever that takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "FEWEST", 1000)
        TRAIN[run.settings.road](run)
    return run


def adapter(run):
    return file_hash(run.path("adapter", "adapter_model.safetensors"))


def test_what_is_trained_is_the_same_with_and_without_measuring(start, tmp_path):
    with_dropout = {"keep": "last", "lora_dropout": 0.2}
    runs = [start(tmp_path / str(every), eval_steps=every, **with_dropout) for every in (0, 1)]
    for run in runs:
        train.train_adapter(run)
    off, on = (run.facts["train"] for run in runs)
    assert adapter(runs[0]) == adapter(runs[1]) and off["losses"] == on["losses"] and off["tokens"] == on["tokens"]
    assert off["held_out"] == [] and [step for step, _ in on["held_out"]] == [1, 2, 3, 4, 5, 6]
    assert on["kept"] == {"rule": "last", "step": 6}
    assert on["held_out"][-1][1] != runs[1].facts["eval"]["after"]["loss"]  # of fewer rows


def test_the_weights_with_the_lowest_held_out_loss_are_kept(rising, capsys):
    facts, after = rising.facts["train"], rising.facts["eval"]["after"]
    step, loss = min(facts["held_out"], key=lambda entry: entry[1])
    assert 0 < step < facts["steps"] == 8 and facts["held_out"][-1][1] > loss + 0.1
    assert facts["kept"] == {"rule": "best", "step": step, "loss": loss}
    assert facts["seconds"] > 0 < facts["measuring_seconds"]
    told = dict(kept_lines(rising.facts))["weights kept"]
    assert f"of step {step} of 8, which had the lowest held-out loss, {loss:.4f}" in told and "measured 8 times" in told
    assert after["loss"] == loss and facts["measuring"]["rows"] == rising.facts["data"]["eval_rows"]


def test_the_kept_weights_are_those_of_that_step(start, rising, tmp_path):
    """They are the adapter of a run that is stopped there by its number of steps, whose last step is its best."""
    run = trained(start(tmp_path, **{**RISING, "max_steps": rising.facts["train"]["kept"]["step"]}))
    assert adapter(run) == adapter(rising)
    assert run.facts["eval"]["after"] == rising.facts["eval"]["after"]


@pytest.mark.slow
@pytest.mark.parametrize("instant", ["measure", "save"])
@pytest.mark.kill
def test_killed_as_it_measures_or_saves_it_ends_as_one_that_was_not(start, rising, tmp_path, monkeypatch, instant):
    run = start(tmp_path, **RISING)
    done = getattr(held_out.HeldOut, instant)
    calls = []

    def killed(self, given):
        done(self, given)
        calls.append(given)
        if len(calls) == (7 if instant == "measure" else 3):
            raise InterruptedError("killed")

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(held_out.HeldOut, instant, killed)
        trained(run)
    assert [path.name for path in checkpoints.numbered(run.path("checkpoints"))][-1] in ("checkpoint-4", "checkpoint-6")
    assert f"checkpoint-4/{held_out.BEST}" in {"/".join(path.parts[-2:]) for path in kept(run.folder)}  # on the Hub too
    trained(run)
    assert adapter(run) == adapter(rising)
    assert {name: run.facts["train"][name] for name in LOSSES} == {name: rising.facts["train"][name] for name in LOSSES}


def test_patience_ends_a_training_and_a_resume_does_not_go_on(start, rising, tmp_path, capsys):
    run = trained(start(tmp_path, **RISING, patience=2))
    facts, best = run.facts["train"], rising.facts["train"]["kept"]
    assert facts["steps"] == best["step"] + 2 < 8 and facts["kept"] == best and adapter(run) == adapter(rising)
    assert facts["stopped"] == {"of": 8, "patience": 2}
    assert "the held-out loss has not fallen for 2 measurements (`patience`)" in capsys.readouterr().out
    assert "had not fallen for 2 measurements" in dict(kept_lines(run.facts))["stopped early"]
    shutil.rmtree(run.path("adapter"))
    trained(run)
    assert run.facts["train"]["losses"] == facts["losses"] and run.facts["train"]["kept"] == best
    assert adapter(run) == adapter(rising)


def test_the_demo_measures_on_the_way_for_less_than_a_twentieth_of_the_work(finished, preferred):
    facts = Run.open(finished).facts["train"]
    assert len(facts["held_out"]) >= 2 and facts["held_out"][-1][0] == facts["steps"] == 150
    assert 0.03 < facts["measuring"]["share"] <= held_out.COST and facts["measuring"]["rows"] >= held_out.ROWS
    assert facts["kept"]["loss"] == min(loss for _, loss in facts["held_out"])
    short = Run.open(preferred).facts["train"]  # whose pairs pay for no two measurements
    assert short["held_out"] == [] and short["kept"] == {"rule": "last", "step": 40}


def test_of_pairs_the_loss_is_the_one_that_trl_tells(start, tmp_path):
    run = start(tmp_path, "dpo", max_steps=1, eval_steps=1)
    model, tokenizer = train.load_model(run.settings), train.load_tokenizer(run.settings)
    pairs = run.rows("eval").select(range(6))
    trainer = dpo.make_trainer(run, model, tokenizer, run.rows("train").select(range(8)), pairs, [])
    on_the_way = held_out.HeldOut(run, trainer)
    trainer.add_callback(on_the_way.callback())
    train.go_on(run, trainer)
    ((step, loss),) = held_out_losses(trainer.state.log_history)
    assert step == 1 and loss == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-4) and on_the_way.plan.rows == 6


@pytest.mark.slow
@pytest.mark.parametrize("precomputed", [False, True])
def test_of_pairs_the_loss_of_all_is_the_one_that_is_measured_at_the_end(start, tmp_path, precomputed):
    few = {"eval_steps": 1, "max_steps": 2, "save_steps": 4, "precompute_reference": precomputed}
    run = trained(start(tmp_path, "dpo", **few))
    facts = run.facts["train"]
    assert facts["measuring"]["rows"] == run.facts["data"]["eval_rows"]
    assert (
        [step for step, _ in facts["held_out"]] == [1, 2]
        and facts["kept"]["step"] == 2
        and facts["kept"]["loss"] < run.facts["eval"]["before"]["loss"]
    )
    assert run.facts["eval"]["after"]["loss"] == pytest.approx(facts["kept"]["loss"], abs=2e-4)


@pytest.mark.parametrize("road, checkpointing, ahead, work", [("sft", True, False, 1 / 3), ("sft", False, False, 1 / 2), ("dpo", True, False, 1 / 2), ("dpo", False, True, 1 / 2)])  # fmt: skip
def test_what_a_measurement_takes_is_counted_in_passes(road, checkpointing, ahead, work):
    from types import SimpleNamespace

    settings = DPOSettings(model="demo", precompute_reference=ahead) if road == "dpo" else SFTSettings(model="demo")
    trainer = SimpleNamespace(args=SimpleNamespace(gradient_checkpointing=checkpointing))
    assert held_out.work_of(trainer, settings) == work


def test_by_auto_ten_measurements_are_taken_where_they_are_paid_for_and_none_where_two_are_not():
    long = held_out.plan("auto", 1000, 1000 * 8 * 100.0, [100] * 200, 1 / 3)
    assert long == (100, 120, 0.05)
    assert held_out.plan("auto", 1000, 1000 * 8 * 100.0, [100] * 20, 1 / 3).rows == 20
    assert held_out.plan("auto", 20, 20 * 8 * 100.0, [100] * 200, 1 / 3) == (0, 0, 0.0)
    asked = held_out.plan(1, 60, 60 * 8 * 100.0, [100] * 200, 1 / 3)
    assert asked.rows == held_out.FEWEST and asked.share == pytest.approx(1 / 3, abs=1e-4)


def test_a_held_out_loss_that_only_rose_is_a_warning(start, tmp_path, capsys):
    run = start(tmp_path)
    run.record("eval", before={"loss": 1.0}, after={"loss": 1.5})
    train.warn_where_nothing_was_gained(run)
    assert "WARNING: the held-out loss rose, from 1.0000 to 1.5000" in capsys.readouterr().out


def test_the_panel_shows_the_held_out_losses_as_a_line_and_in_words():
    log = [{"step": step, "loss": 3.0 - step} for step in (1, 2)]
    log += [{"step": 1, "eval_loss": 2.0, "eval_seconds": 0.1}, {"step": 2, "eval_loss": 2.5, "eval_seconds": 0.1}]
    html = panel_html(log, 4, 1.0, 1.0)
    assert "held-out loss 2.5000 (lowest 2.0000, after step 1)" in html and html.count("<polyline") == 3
    assert panel_html(log[:2], 4, 1.0, 1.0).count("<polyline") == 2 and held_out_losses(log[:2]) == []
