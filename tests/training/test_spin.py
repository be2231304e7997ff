"""Self-play: each round's opponent is the model it began with, the best round is kept, and a kill loses nothing."""

import math
import subprocess
import sys

import pytest
from support.commands import DEMO, killed_after, sets

from autosloth.errors import ModelError
from autosloth.notebook.live import summary_lines
from autosloth.run import Run, read_json, write_json
from autosloth.settings import SPINSettings
from autosloth.training import checkpoints, spin, stopping
from autosloth.training.rounds_table import as_text, row_of

SHORT = {**DEMO, "rounds": 2, "prompts_per_round": 48, "eval_answers": 4, "merged": False, "quantizations": "[]"}


def test_the_demo_is_told_apart_from_its_own_answers_and_becomes_polite(played):
    facts = read_json(played / "facts.json")
    before, after = facts["eval"]["before"], facts["eval"]["after"]
    assert after["loss"] < before["loss"] and facts["verify"]["passed"]
    assert [played["round"] for played in facts["rounds"]] == list(range(len(facts["rounds"])))
    for each in facts["rounds"]:
        assert each["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert each["generated"]["pairs"] + sum(each["generated"]["left_out"].values()) == 144
        assert set(each["eval"]) >= {"nll", "perplexity", "loss", "reward_accuracy", "reward_margin", "chosen_logp", "rejected_logp", "chosen_change", "rejected_change", "mean_length", "eos_rate", "distinct_2"}  # fmt: skip
    best = facts["train"]["best_round"]
    losses = [facts["eval"]["before"]["loss"], *(each["eval"]["nll"] for each in facts["rounds"])]
    assert losses[best + 1] == min(losses) == pytest.approx(after["loss"], abs=1e-3)
    assert facts["train"]["steps"] == sum(each["steps"] for each in facts["rounds"])


def test_what_is_kept_of_the_rounds(played):
    for number, each in enumerate(read_json(played / "facts.json")["rounds"]):
        folder = played / "rounds" / str(number)
        assert (folder / "adapter" / "adapter_model.safetensors").is_file() and read_json(folder / "facts.json") == each
        assert (folder / "train" / "answers-00000.json").is_file()
    assert not list(played.rglob("checkpoint-*")) and not [
        path for path in played.rglob("*ref*") if path.name != "reference"
    ]
    best = read_json(played / "facts.json")["train"]["best_round"]
    kept = played / "rounds" / ("start" if best < 0 else f"{best}/adapter") / "adapter_model.safetensors"
    assert (played / "adapter" / "adapter_model.safetensors").read_bytes() == kept.read_bytes()


def test_the_card_has_the_rounds_and_the_citation(played):
    card = (played / "publish" / "README.md").read_text()
    for told in ("tuned by self-play (SPIN)", "| the start | ", "| round 1 | ", "steps of plain SFT | ", "arXiv 2401.01335", "What is published is the model after round", "](rounds.png)"):  # fmt: skip
        assert told in card, told
    facts = read_json(played / "facts.json")
    lines = dict(summary_lines(Run.open(played)))
    for number, each in enumerate(facts["rounds"], start=1):  # from 1 wherever they are read of
        loss = each["eval"]["nll"]
        assert f"| round {number} | {loss} |" in card and f"held-out loss {loss:.4f}" in lines[f"round {number}"]
        assert row_of(each, {"eval": each["eval"]}).startswith(f"spin: round {number}: ")
    assert "| round 0 |" not in card and "round 0" not in as_text(facts, facts["rounds"][0]["eval"])
    assert (played / "publish" / "rounds.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_steps_of_plain_sft_stand_beside_the_rounds(played):
    facts = read_json(played / "facts.json")
    assert facts["sft_arm"]["steps"] == facts["train"]["steps"]
    assert facts["sft_arm"]["nll"] < facts["eval"]["before"]["loss"]


def test_whether_there_is_something_to_gain_is_said_early():
    from types import SimpleNamespace

    import torch

    said, measured = [], torch.nn.Linear(1, 1).eval()
    for share, expected in ((0.8, "something to gain"), (0.57, "a little to gain"), (0.5, "hardly anything")):
        probe = stopping.first_probe(SPINSettings())
        probe.trainer = SimpleNamespace(args=SimpleNamespace(gradient_accumulation_steps=16), model=measured)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stopping, "rewarded", lambda trainer, beta, share=share: {"reward_accuracy": share})
            patch.setattr(stopping, "say", said.append)
            for step in range(1, 61):
                warm = SimpleNamespace(get_warmup_steps=lambda steps: steps // 10)
                probe.on_step_end(warm, SimpleNamespace(global_step=step, max_steps=60), None)
        assert expected in said[-1] and f"after 16 steps the accuracy on held-out pairs is {share:.0%}" in said[-1]
    assert len(said) == 3 and measured.training


@pytest.mark.slow
def test_the_rounds_can_begin_with_plain_sft_from_the_bare_base(base, tmp_path, cli):
    """And a round of one step moves the model: a warm-up does not take it."""
    few = {"rounds": 1, "prompts_per_round": 16, "warmup": 0.1, "sft_steps": 12, "sft_learning_rate": 2e-3}
    result = cli("spin", *sets(**SHORT | few, adapter="null", storage=tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    facts = read_json(tmp_path / "short" / "facts.json")
    assert facts["sft_start"]["steps"] == 12 and facts["sft_start"]["learning_rate"] == 2e-3
    assert facts["sft_start"]["nll"] == facts["eval"]["before"]["loss"] < 3.0  # the bare base: 6 and more
    (round,) = facts["rounds"]
    assert round["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert round["steps"] == 1 and abs(round["eval"]["chosen_change"]) > 0 and round["eval"]["reward_margin"] != 0
    assert "the warm-up is 0 instead of 1 step:" in result.stdout
    assert "| the start, after 12 steps of plain SFT |" in (tmp_path / "short" / "publish" / "README.md").read_text()


def test_a_second_run_skips_what_is_done(played, cli):
    result = cli("spin", *sets(**DEMO, sft_arm=True, storage=played.parent))
    assert result.returncode == 0 and "train: done already, skipped" in result.stdout


# Where it is killed: the file that is there by then.
MOMENTS = {
    "in generation": "rounds/0/held_out/answers-00000.json",
    "in training": "rounds/0/checkpoints/checkpoint-2/trainer_state.json",
    "between the rounds": "rounds/0/facts.json",
}


@pytest.fixture(scope="module")
def never_killed(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    play(folder)
    return folder / "short"


def play(folder):
    command = [sys.executable, "-m", "autosloth", "spin", *sets(**SHORT, save_steps=2, storage=folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_it_ends_with_the_same_files(never_killed, tmp_path, moment):
    there = tmp_path / "short" / MOMENTS[moment]
    killed_after(there, "spin", *sets(**SHORT, save_steps=2, storage=tmp_path))
    assert not (tmp_path / "short" / ".done" / "train.json").exists()
    if moment == "between the rounds":  # the latest that it can be killed: what is no longer needed is still there
        (there.parent / "checkpoints" / "checkpoint-3").mkdir(parents=True, exist_ok=True)
    play(tmp_path)
    runs = [read_json(folder / "facts.json") for folder in (never_killed, tmp_path / "short")]
    for one, other in zip(*(facts["rounds"] for facts in runs), strict=True):
        assert one["generated"] == other["generated"]
        assert one["eval"] == pytest.approx(other["eval"], abs=5e-3)
    files = [{path.relative_to(folder).as_posix() for path in folder.rglob("*")} for folder in (never_killed, tmp_path / "short")]  # fmt: skip
    assert files[0] == files[1]


def test_a_round_whose_adapter_the_disk_lost_some_of_is_played_again(tmp_path, capsys):
    from types import SimpleNamespace

    game = SimpleNamespace(folder=lambda number: tmp_path / str(number))
    weights = tmp_path / "0" / "adapter" / "adapter_model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    assert spin.Game.played(game, 0) is None
    checkpoints.seal(weights.parent)
    write_json(tmp_path / "0" / "facts.json", {"round": 0})
    assert spin.Game.played(game, 0) == {"round": 0}
    weights.write_bytes(b"\0" * 7)
    assert spin.Game.played(game, 0) is None
    said = "is damaged (adapter_model.safetensors is not as it was written); the round is played again"
    assert capsys.readouterr().out == f"spin: the adapter of round 1 {said}\n"


def test_a_wrong_opponent_stops_the_round_with_a_sentence():
    from types import SimpleNamespace

    first, later = SimpleNamespace(global_step=1), SimpleNamespace(global_step=2)
    right = {"loss": math.log(2), "rewards/margins": 0.0}
    for settings, logs in ((SPINSettings(), right), (SPINSettings(loss="hinge"), {**right, "loss": 1.0})):
        check = stopping.start_check(settings)
        check.on_log(None, first, None, logs)
        check.on_log(None, later, None, {"loss": 0.1, "rewards/margins": 3.0})
        for wrong in ({**logs, "loss": logs["loss"] - 0.03}, {**logs, "rewards/margins": 0.03}):
            with pytest.raises(ModelError, match="the opponent is not the model that the round began with"):
                check.on_log(None, first, None, wrong)


def measured(nll=1.0, reward_accuracy=0.8, mean_length=20.0, chosen_change=1.0, answers=30):
    facts = {
        "answers": answers,
        "nll": nll,
        "reward_accuracy": reward_accuracy,
        "mean_length": mean_length,
        "reward_margin": 0.5,
    }
    return {"eval": {**facts, "chosen_change": chosen_change, "chosen_error": 0.25}}


@pytest.mark.parametrize(
    "rounds, reason",
    [
        ([measured(0.9)], None),
        ([measured(0.9, reward_accuracy=0.55)], None),
        ([measured(1.0, reward_accuracy=0.55)], "which is chance"),
        ([measured(1.03, reward_accuracy=0.51)], "became less likely (1.0000 to 1.0300"),
        ([measured(1.03)], "became less likely (1.0000 to 1.0300"),
        ([measured(0.9), measured(0.915)], None),
        ([measured(0.9), measured(0.92)], "became less likely (0.9000 to 0.9200"),
        ([measured(0.9, chosen_change=-0.49)], None),
        ([measured(0.9, chosen_change=-0.51)], "by 0.51 nats an answer, while the margin grew"),
        ([measured(0.9, mean_length=31.0)], "drifted from 20 to 31 tokens"),
        ([measured(0.9, mean_length=13.0)], "drifted from 20 to 13 tokens"),
        ([measured(0.9, mean_length=13.0, answers=3)], None),
    ],
)
def test_another_round_is_not_played_where_it_would_not_help(rounds, reason):
    said = stopping.reason_to_stop(measured(), rounds)
    assert said is None if reason is None else reason in said


@pytest.mark.parametrize("losses, best", [([1.1, 1.2], -1), ([0.9, 0.8], 1), ([0.8, 0.9], 0)])
def test_the_best_round_is_the_one_that_makes_the_held_out_answers_likeliest(losses, best):
    assert stopping.best_round(measured(), [measured(loss) for loss in losses]) == best


def test_the_papers_recipe_is_a_preset_and_each_value_can_be_set(tmp_path):
    paper = SPINSettings(preset="paper")
    assert (paper.prompts_per_round, paper.epochs, paper.optimizer, paper.warmup) == (50_000, 2.0, "rmsprop", 0.1)
    assert paper.batch_size * paper.gradient_accumulation == 64 and paper.mix_previous
    assert [paper.of_round(k).learning_rate for k in range(4)] == [5e-7, 5e-7, 1e-7, 1e-7]
    assert [paper.of_round(k).beta for k in range(4)] == [0.1, 0.1, 0.1, 5.0]
    free = SPINSettings(learning_rate=1e-5)
    assert (free.rounds, free.prompts_per_round, free.mix_previous, free.of_round(2).learning_rate) == (3, 1000, False, 1e-5)  # fmt: skip
    assert SPINSettings(preset="paper", rounds=2).of_round(1).beta == 5.0


def test_vllm_is_refused_before_training_where_it_cannot_run(cli, tmp_path):
    result = cli("check", "spin", *sets(**DEMO, fast_inference=True, storage=tmp_path))
    assert result.returncode == 1 and "`fast_inference` is set, and " in result.stdout + result.stderr
