"""Several processes train one model: the first does the road and writes, all share out the rows of a step and self-play's answers."""

import json
import math
import shutil
import subprocess
import sys

import pytest
from support.commands import DEMO, sets
from support.patience import HUNG

from autosloth.data.stage import prepare_data
from autosloth.run import Run, read_json
from autosloth.settings import SFTSettings
from autosloth.training import opponent, train
from autosloth.training.measure import standing
from autosloth.training.spin import Game

SCRIPT = """
from autosloth.training import opponent
from autosloth.cli import main
opponent.CHUNK = 16
main()
"""


def in_two_processes(tmp_path, *arguments, how=("--multi_gpu",)):
    """Run the command line in two processes by `accelerate launch`; where there is no GPU they are on the CPU."""
    (tmp_path / "autosloth_in_two.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *how, "--num_processes", "2"]
    port = ["--main_process_port", "0"]  # any that is free
    command = [*launcher, *port, str(tmp_path / "autosloth_in_two.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=HUNG)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch_does_and_one_of_them_does_the_rest(engine, base, tmp_path):
    short = {**DEMO, "epochs": 0.5, "max_steps": 0, "save_steps": 5, "eval_answers": 4, "max_new_tokens": 8}
    short |= {"merged": False, "storage": str(tmp_path)}
    result = in_two_processes(tmp_path, "sft", *sets(**short | {"batch_size": 8, "gradient_accumulation": 1}))
    facts = read_json(tmp_path / "short" / "facts.json")
    for once in ("data: done in", "train: done in", "gguf: done in", "verify: passed", "publish: done in"):
        assert result.stdout.count(once) == 1, once
    assert facts["verify"]["passed"] and (tmp_path / "short" / "publish" / "README.md").is_file()
    expected = {"batch_size": 8, "gradient_accumulation": 1, "processes": 2, "rows_per_step": 16}
    assert expected.items() <= facts["train"].items()
    assert (
        facts["train"]["steps"]
        == math.ceil(math.ceil(facts["data"]["train_rows"] / 16) / 2)
        == len(facts["train"]["losses"])
    )

    alone = Run.create(SFTSettings(**short | {"run_name": "alone", "batch_size": 16}))
    prepare_data(alone)
    train.train_adapter(alone)
    for (step, loss), (other, wanted) in zip(facts["train"]["losses"], alone.facts["train"]["losses"], strict=True):
        assert step == other and loss == pytest.approx(wanted, abs=2e-3)
    assert facts["train"]["tokens"] == alone.facts["train"]["tokens"]
    assert facts["eval"]["after"]["loss"] == pytest.approx(alone.facts["eval"]["after"]["loss"], abs=0.02)

    again = in_two_processes(tmp_path, "sft", *sets(**short | {"batch_size": 8, "gradient_accumulation": 1}))
    assert again.stdout.count("train: done already, skipped") == 1


@pytest.mark.slow
def test_weights_that_are_shared_out_learn_what_whole_ones_do(engine, base, tmp_path):
    """FSDP (accelerate's, version 2) beside data parallel: the same losses, and a GGUF that is proven."""
    short = {**DEMO, "max_steps": 4, "eval_answers": 2, "max_new_tokens": 8, "merged": False, "storage": str(tmp_path)}
    short |= {"eval_steps": 2}
    facts = []
    for name, how in (("copies", ["--multi_gpu"]), ("shards", ["--use_fsdp", "--fsdp_version", "2"])):
        in_two_processes(tmp_path, "sft", *sets(**short | {"run_name": name}), how=how)
        facts.append(read_json(tmp_path / name / "facts.json"))
    copies, shards = facts
    assert shards["verify"]["passed"] and shards["train"]["processes"] == 2
    for when in ("before", "after"):
        assert shards["eval"][when]["loss"] == pytest.approx(copies["eval"][when]["loss"], abs=2e-3)
    for (step, loss), (other, wanted) in zip(shards["train"]["losses"], copies["train"]["losses"], strict=True):
        assert step == other and loss == pytest.approx(wanted, abs=2e-3)
    assert copies["eval"]["after"]["loss"] < copies["eval"]["before"]["loss"] - 0.05
    for (step, loss), (other, wanted) in zip(shards["train"]["held_out"], copies["train"]["held_out"], strict=True):
        assert step == other and loss == pytest.approx(wanted, abs=2e-3)


@pytest.mark.slow
def test_of_weights_that_are_shared_out_the_best_are_put_together_and_kept(engine, base, tmp_path):
    rising = {
        "learning_rate": 0.03,
        "scheduler": "constant",
        "warmup": 0,
        "max_steps": 8,
        "eval_steps": 1,
        "save_steps": 2,
    }
    short = {**DEMO, "eval_answers": 2, "max_new_tokens": 8, "quantizations": "[]", "merged": False, **rising}
    in_two_processes(tmp_path, "sft", *sets(**short, storage=tmp_path), how=["--use_fsdp", "--fsdp_version", "2"])
    facts = read_json(tmp_path / "short" / "facts.json")
    kept, last = facts["train"]["kept"], facts["train"]["held_out"][-1]
    assert kept["step"] < 8 and kept["loss"] < last[1] - 0.2 and facts["eval"]["after"]["loss"] < last[1] - 0.2


@pytest.mark.slow
def test_two_processes_share_out_the_answers_of_self_play_and_lose_none(engine, base, tmp_path, monkeypatch):
    short = {**DEMO, "rounds": 1, "prompts_per_round": 48, "eval_answers": 2, "max_new_tokens": 24, "merged": False}
    short |= {"quantizations": "[]", "storage": str(tmp_path)}
    result = in_two_processes(tmp_path, "spin", *sets(**short))
    run = Run.open(tmp_path / "short")
    assert len(run.facts["rounds"]) == 1 and result.stdout.count("train: done in") == 1
    chunks = sorted(run.path("rounds", "0", "train").glob("answers-*.json"))
    kept = [ids for chunk in chunks for ids in json.loads(chunk.read_text())["answers"]]
    assert len(chunks) == 3 and len(kept) == 48

    shutil.rmtree(run.path("rounds", "0", "train"))
    monkeypatch.setattr(opponent, "CHUNK", 16)
    game = Game(run)
    game.load(-1)
    assert game.generate(0, "train", game.drawn(0)) == kept

    pairs, _ = opponent.pair_up(game.measured, game.generate(0, "held_out", game.measured), game.ends)
    game.load(0)
    tokens = sum(len(pair["chosen_ids"]) for pair in pairs) / len(pairs)
    measured = run.facts["rounds"][0]["eval"]["chosen_logp"]  # by both, of all pairs
    assert measured == pytest.approx(-standing(game.model, pairs)["nll"] * tokens, abs=0.01)
