"""A trained model and its base on tasks of lm-eval, which is installed for these tests alone."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import called_here, command_line, made_once

from autosloth.publish import write_card
from autosloth.run import Run, read_json
from autosloth.score import harness, score

MULTIPLE = """
task: sloth_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["{{{{expected}}}}", "Nobody knows."]
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
OPEN = """
task: sloth_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{expected}}}}"
generation_kwargs: {{until: ["</s>"], max_gen_toks: 24, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="session")
def lm_eval(tmp_path_factory, worker_id):
    """A folder with lm-eval and what it takes besides our own environment."""

    def install(folder):
        wanted = Path(__file__).with_name("lm-eval.txt")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, "-r", wanted]
        subprocess.run(pip, check=True, capture_output=True)

    return made_once(tmp_path_factory, worker_id, "lm-eval", install)


@pytest.mark.slow
def test_tasks_measure_what_our_own_answers_do(copied, tmp_path, lm_eval):
    """Open questions by the exact match of our own greedy answers; what is measured is told in facts, card and `show`."""
    run = Run.open(copied)
    asked = [chat for chat in run.rows("eval")["messages"] if len(chat) == 2][:6]
    rows = [{"question": question["content"], "expected": answer["content"]} for question, answer in asked]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in (("choice", MULTIPLE), ("answer", OPEN)):
        (tmp_path / f"{name}.yaml").write_text(task.format(rows=tmp_path / "rows.jsonl"))
    both = f"{tmp_path / 'choice.yaml'}, {tmp_path / 'answer.yaml'}"
    given = ("--tasks", both, "--limit", "5", "--chat-template")
    result = command_line("score", copied, *given, PYTHONPATH=os.pathsep.join(map(str, [*sys.path[1:], lm_eval])))
    assert result.returncode == 0, result.stderr
    choice, answers = read_json(copied / "facts.json")["benchmarks"]
    assert (choice["task"], choice["metric"], choice["filter"], choice["lm_eval"]) == (
        "sloth_choice",
        "acc",
        "none",
        "0.4.13",
    )
    assert (answers["task"], answers["metric"], answers["higher_is_better"]) == ("sloth_answer", "exact_match", True)
    assert (answers["questions"], answers["of"], answers["limit"], answers["chat_template"]) == (5, 6, 5, True)
    five = tmp_path / "five.jsonl"
    five.write_text(
        "".join(json.dumps({"question": row["question"], "answer": row["expected"]}) + "\n" for row in rows[:5])
    )
    score(run, str(five), "exact", 24)
    ours = read_json(copied / "facts.json")["scores"][-1]
    assert [answers[who]["value"] for who in ("base", "tuned")] == [ours[who]["mean"] for who in ("base", "tuned")]
    assert answers["tuned"]["value"] > answers["base"]["value"] and choice["tuned"]["value"] >= choice["base"]["value"]
    assert (
        "sloth_answer exact_match: " in result.stdout
        and "(the first 5 of 6 questions, in the chat template)" in result.stdout
    )
    write_card.again(Run.open(copied))
    card = (copied / "publish" / "README.md").read_text()
    assert "| sloth_answer exact_match | the first 5 of 6 questions, in the chat template |" in card
    assert "sloth_choice" in called_here(["show", copied], {"COLUMNS": "200"}).stdout
    unknown = command_line(
        "score", copied, "--tasks", "sloth_anwser", PYTHONPATH=os.pathsep.join(map(str, [*sys.path[1:], lm_eval]))
    )
    assert unknown.returncode == 1 and "lm-eval knows no task 'sloth_anwser'." in unknown.stderr


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_lm_eval_the_way_out_is_named(copied):
    said = called_here(["score", copied, "--tasks", "gsm8k"], {})
    assert said.returncode == 1 and "which is not installed.\n  Run `pip install lm-eval`" in said.stderr


@pytest.mark.parametrize(
    "given, told",
    [
        ((), "--data / --tasks: give one of them."),
        (("--data", "x", "--tasks", "y"), "--data / --tasks: give one of them."),
        (("--tasks", "y", "--metric", "exact"), "--metric: it is for `--data`"),
        (("--data", "x", "--metric", "exact", "--limit", "5"), "--limit: it is for `--tasks`."),
        (("--data", "x"), "--metric: it is missing; give exact, contains"),
    ],
)
def test_what_does_not_go_together_is_told(copied, given, told):
    said = called_here(["score", copied, *given], {"COLUMNS": "200"})
    assert said.returncode == 2 and told in " ".join(said.stderr.replace("│", " ").split())


def test_of_a_group_its_own_figure_is_told_and_not_those_of_its_tasks(monkeypatch):
    """The form of lm-eval's results (0.4.13, result_schema.py)."""
    monkeypatch.setitem(sys.modules, "lm_eval", type(sys)("lm_eval"))
    sys.modules["lm_eval"].__version__ = "0.4.13"
    part = {"alias": " - one", "sample_len": 4, "acc,none": 0.25, "acc_stderr,none": 0.25}
    group = {"alias": "all", "sample_len": 8, "acc,none": 0.5, "acc_stderr,none": "N/A"}
    results = {
        **{"results": {"all": group, "one": part, "two": part}, "group_subtasks": {"all": ["one", "two"]}},
        **{"n-samples": {"one": {"original": 9, "effective": 4}, "two": {"original": 9, "effective": 4}}},
        **{"versions": {"all": 2.0}, "n-shot": {"one": 5, "two": 5}, "higher_is_better": {"all": {"acc": True}}},
    }
    (entry,) = harness.entries_of({"tuned": results, "base": results})
    assert (entry["task"], entry["tuned"], entry["questions"]) == ("all", {"value": 0.5, "stderr": None}, 8)
    assert harness.asked(entry | {"chat_template": False}) == "8 questions"
