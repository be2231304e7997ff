"""A trained model and its base, scored on files."""

import json

import pytest
from support.commands import called_here, command_line

from autosloth.errors import DataError
from autosloth.publish import write_card
from autosloth.run import Run, file_hash, read_json
from autosloth.score import METRICS, score


def written(path, pairs):
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs))
    return path


def mean(values):
    return round(sum(values) / len(values), 4)


@pytest.mark.slow
def test_both_models_answer_as_they_did_when_they_were_measured(copied, tmp_path):
    """The base as before the training and the tuned model as after it; all that is left out, or was learnt, is told, in card and `show` too."""
    facts, settings = Run.open(copied).facts, Run.open(copied).settings
    samples = {when: facts["eval"][when]["samples"] for when in ("before", "after")}
    learnt = Run.open(copied).rows("train")[0]["messages"]
    pairs = [(row["question"], row["expected"]) for row in samples["after"]]
    data = written(tmp_path / "q|1.jsonl", [*pairs, ("What?", "..."), ("Empty?", ""), (learnt[-2]["content"], learnt[-1]["content"])])  # fmt: skip
    result = command_line("score", copied, "--data", data, "--metric", "rouge")
    assert result.returncode == 0, result.stderr
    (told,) = read_json(copied / "facts.json")["scores"]
    assert (told["file"], told["sha256"], told["metric"]) == ("q|1.jsonl", file_hash(data), "rouge")
    assert (told["rows"], told["scored"], told["learnt"], told["rows_left_out"]) == (6, 4, 1, [4])
    assert told["left_out"] == {"empty_answer": 1, "whose answer holds no word": 1}
    assert told["max_new_tokens"] == settings.max_new_tokens
    alone = written(tmp_path / "samples.jsonl", pairs)
    score(Run.open(copied), str(alone), "rouge")
    _, told = read_json(copied / "facts.json")["scores"]
    for who, when in (("base", "before"), ("tuned", "after")):
        right = [METRICS["rouge"](row["answer"], row["expected"]) for row in samples[when]]
        assert told[who]["mean"] == mean(right), who
    assert told["difference"]["mean"] == pytest.approx(told["tuned"]["mean"] - told["base"]["mean"], abs=2e-4)
    score(Run.open(copied), str(alone), "rouge")
    assert len(Run.open(copied).facts["scores"]) == 2  # the same again takes its place
    write_card.again(Run.open(copied))
    card = (copied / "publish" / "README.md").read_text()
    assert (
        "| q&#124;1.jsonl | rouge | 4 of 6 |" in card
        and "1 of its rows were trained on. Left out: 1 empty answer" in card
    )
    assert "scoreonq|1.jsonlrouge" in "".join(called_here(["show", copied], {"COLUMNS": "200"}).stdout.split())


def test_a_file_of_which_nothing_can_be_scored_is_refused_and_nothing_recorded(copied, tmp_path):
    data = written(tmp_path / "q.jsonl", [("One?", "one"), ("Two?", "two")])
    with pytest.raises(DataError, match=r"Of the 2 rows of .* none can be scored \(2 whose answer holds no number\)"):
        score(Run.open(copied), str(data), "number")
    assert "scores" not in Run.open(copied).facts


def test_wrong_usage_is_told(copied):
    wrong = called_here(["score", copied, "--data", "x", "--metric", "wer"], {})
    assert wrong.returncode == 2 and "give exact, contains, regex" in wrong.stderr
    missing = command_line("score", copied, "--data", copied / "none.jsonl", "--metric", "Exact")
    assert missing.returncode == 1 and "none.jsonl does not exist." in missing.stderr
