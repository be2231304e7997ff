"""What held-out answers are worth, before and after a training."""

import pytest
from datasets import Dataset
from support.commands import DEMO, called_here

from autosloth.errors import SettingsError
from autosloth.run import Run, read_json
from autosloth.score import METRICS
from autosloth.settings import SFTSettings
from autosloth.training.measure import gained, refuse_unscorable


def told(metric, scores):
    return {"metric": metric, "scores": scores}


def held_out(*answers):
    rows = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}] for answer in answers]
    return Dataset.from_list([{"messages": row, "tools": None} for row in rows])


def test_the_metrics_of_the_settings_are_those_that_there_are():
    assert set(SFTSettings.model_fields["metric"].annotation.__args__) == set(METRICS)


def test_scores_before_and_after_are_paired_row_by_row():
    both = gained(told("number", [0.0, None, 1.0, 0.0]), told("number", [1.0, None, 1.0, None]), seed=1)
    assert (both["name"], both["scored"], both["answers"], both["few"]) == ("number", 2, 4, True)
    means = [both[name]["mean"] for name in ("before", "after", "difference")]
    assert means == [0.5, 1.0, 0.5]
    assert both["difference"]["low"] == 0.0 and both["difference"]["high"] == 1.0


@pytest.mark.parametrize(
    "before, after",
    [
        (told("number", [1.0]), told("exact", [1.0])),
        (told("exact", [1.0]), told("exact", [1.0, 1.0])),
        (told("exact", [None]), told("exact", [None])),
        ({}, told("exact", [1.0])),  # of a run that an older version began
        ({}, {}),
    ],
)
def test_nothing_is_told_of_scores_that_cannot_be_paired(before, after):
    assert gained(before, after, seed=1) == {}


def test_a_finished_run_tells_what_its_answers_gained(finished):
    measured = read_json(finished / "facts.json")["eval"]
    for when in ("before", "after"):
        assert measured["gained"][when]["mean"] == measured[when]["exact_match"], when
        assert len(measured[when]["scores"]) == measured[when]["answers_compared"] == measured["gained"]["scored"]
    assert measured["gained"]["difference"]["low"] > 0.5
    shown = " ".join(called_here(["show", finished], {"COLUMNS": "200"}).stdout.split())
    assert "difference (exact match of 64 held-out answers" in shown


def test_a_metric_that_can_score_no_answer_is_refused_before_a_model_is_loaded(tmp_path):
    settings = SFTSettings(metric="number", eval_answers=2)
    refuse_unscorable(settings, held_out("nothing", "7"))
    refuse_unscorable(settings.model_copy(update={"metric": "rouge"}), held_out("nothing", "more"))
    with pytest.raises(SettingsError, match="can score none of the 2 held-out answers that would be compared: 2 whose"):
        refuse_unscorable(settings, held_out("nothing", "more", "7"))
    given = [f"{name}={value}" for name, value in {**DEMO, "storage": tmp_path, "metric": "number"}.items()]
    said = called_here(["sft", *(word for each in given for word in ("--set", each))], {})
    assert said.returncode == 1 and "`metric: number` can score none of the 64 held-out answers" in said.stderr
    assert not Run.open(tmp_path / "short").path("checkpoints").exists()
