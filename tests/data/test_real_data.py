"""The whole road on real input: word problems and instructions, given as local files."""

import pytest
import yaml
from support.commands import command_line

from autosloth.run import read_json

CONTRACT = {"settings.json", "facts.json", "data", "checkpoints", "adapter", "merged", "gguf", "publish", ".done"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, rows, split",
    [
        ("gsm8k_train.jsonl", 400, "train[:400]"),
        ("alpaca_en_demo.json", 999, "train"),
    ],
)
def test_the_road_on_real_rows(real_data, base, tmp_path, name, rows, split):
    settings = {
        **{
            "model": "demo",
            "dataset": str(real_data(name)),
            "split": split,
            "storage": str(tmp_path),
            "run_name": "real",
        },
        **{"max_steps": 30, "learning_rate": 2e-3, "eval_rows": 40, "eval_answers": 4, "batch_size": 8},
    }
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    result = command_line("sft", tmp_path / "settings.yaml")
    assert result.returncode == 0, result.stdout + result.stderr
    facts = read_json(tmp_path / "real" / "facts.json")
    assert facts["eval"]["after"]["loss"] < facts["eval"]["before"]["loss"] - 0.5
    assert facts["data"]["read"] == rows and facts["data"]["kept"] + sum(facts["data"]["dropped"].values()) == rows
    assert facts["verify"]["passed"]
    assert {path.name for path in (tmp_path / "real").iterdir()} >= CONTRACT


@pytest.mark.slow
def test_the_road_of_dpo_on_real_pairs(real_data, base, tmp_path):
    settings = {
        "model": "demo",
        "dataset": str(real_data("dpo_en_demo.json")),
        "split": "train[:60]",
        "run_name": "real",
    }
    settings |= {"max_steps": 6, "batch_size": 4, "max_length": 768, "storage": str(tmp_path), "adapter": None}
    settings |= {"learning_rate": 1e-3, "eval_answers": 2, "max_new_tokens": 16, "merged": False}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    result = command_line("dpo", tmp_path / "settings.yaml")
    assert result.returncode == 0, result.stdout + result.stderr
    facts = read_json(tmp_path / "real" / "facts.json")
    assert facts["data"]["kept"] + sum(facts["data"]["dropped"].values()) == facts["data"]["read"] == 60
    assert facts["data"]["dropped"]["prompt_beyond_max_length"] > 0 and facts["data"]["truncated"] > 0
    assert facts["train"]["first_loss"] == pytest.approx(0.6931, abs=1e-3) and facts["eval"]["before"]["kl"] == 0
    assert facts["eval"]["after"]["kl"] > 0 and facts["verify"]["passed"]


@pytest.mark.slow
def test_self_play_on_real_word_problems(real_data, base, tmp_path):
    settings = {
        "model": "demo",
        "dataset": str(real_data("gsm8k_train.jsonl")),
        "split": "train[:300]",
        "run_name": "sft",
    }
    settings |= {"max_length": 384, "storage": str(tmp_path), "eval_rows": 16, "merged": False, "max_new_tokens": 160}
    start = {"quantizations": [], "max_steps": 30, "batch_size": 8, "eval_answers": 0}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(settings | start))
    result = command_line("sft", tmp_path / "sft.yaml")
    assert result.returncode == 0, result.stdout + result.stderr
    game = {"run_name": "spin", "adapter": str(tmp_path / "sft"), "prompts_per_round": 32, "eval_answers": 2}
    (tmp_path / "spin.yaml").write_text(yaml.safe_dump(settings | game))
    result = command_line("spin", tmp_path / "spin.yaml")
    assert result.returncode == 0, result.stdout + result.stderr
    facts = read_json(tmp_path / "spin" / "facts.json")
    assert facts["rounds"][0]["first_loss"] == pytest.approx(0.6931, abs=1e-3) and facts["verify"]["passed"]
    assert facts["rounds"][0]["generated"]["pairs"] > 0
