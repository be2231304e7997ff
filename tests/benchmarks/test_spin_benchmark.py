"""The benchmark of self-play: what it calls exact is exact, and its sides are trained by as many steps."""

import json
import math
from pathlib import Path

import numpy
import pytest

from autosloth.run import Run, read_json
from autosloth.settings import SPINSettings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench(benchmarks):
    import spin

    return spin


@pytest.fixture(scope="module")
def prepared(bench, engine, base, tmp_path_factory):
    """A run with the benchmark's rows, and the bare base with its tokenizer."""
    from autosloth.data.stage import prepare_data
    from autosloth.models.engine import load_model, load_tokenizer

    folder = tmp_path_factory.mktemp("truth")
    bench.write_rows(folder / "rows", 1, 96)
    given = {"dataset": str(folder / "rows"), "adapter": None, "storage": str(folder), "run_name": "truth"}
    run = Run.create(SPINSettings.load(bench.SHARED | given))
    prepare_data(run)
    return run, load_model(run.settings), load_tokenizer(run.settings)


def test_the_truth_is_a_distribution_and_no_held_out_sloth_is_trained_on(bench):
    truth = bench.truth_of(bench.questions_about(bench.sloths(1)[1]))
    assert truth.shape == (36, 8) and numpy.exp(truth).sum(axis=1) == pytest.approx(1)
    trained, held_out = bench.sloths(1)
    assert not set(trained) & set(held_out) and bench.sloths(1) == (trained, held_out) != bench.sloths(2)


def test_each_answer_is_scored_as_one_token_after_another_by_the_plain_model(bench, prepared, base):
    import torch
    from transformers import AutoModelForCausalLM

    run, model, tokenizer = prepared
    questions = bench.questions_about(bench.sloths(1)[1])[:2]
    found = bench.answer_logprobs(model, tokenizer, run.settings, questions)
    plain = AutoModelForCausalLM.from_pretrained(base)
    for (question, attribute), scored in zip(questions, found, strict=True):
        for answer, logp in zip(bench.true_answers(attribute), scored, strict=True):
            asked = tokenizer(f"<s>[INST] {question} [/INST]", add_special_tokens=False).input_ids
            ids, expected = list(asked), 0.0
            for token in tokenizer(f"<s>[INST] {question} [/INST] {answer}</s>", add_special_tokens=False).input_ids[len(asked) :]:  # fmt: skip
                with torch.no_grad():
                    expected += plain(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token].item()
                ids.append(token)
            assert ids[-1] == tokenizer.eos_token_id and logp == pytest.approx(expected, abs=1e-3)


def test_the_roads_held_out_loss_follows_from_the_scores(bench, prepared):
    from autosloth.models.decoding import end_tokens
    from autosloth.training import spin

    run, model, tokenizer = prepared
    questions = bench.questions_about(bench.sloths(1)[1])
    scores = dict(zip(questions, bench.answer_logprobs(model, tokenizer, run.settings, questions), strict=True))
    attributes = dict(questions)
    rows = spin.questions(run.rows("eval"), end_tokens(model, tokenizer))
    total = 0.0
    for chat in run.rows("eval")["messages"]:
        question, answer = (turn["content"] for turn in chat)
        attribute = attributes[question]
        total -= scores[question, attribute][list(bench.true_answers(attribute)).index(answer)]
    assert len(rows) == 72 and numpy.exp(list(scores.values())).sum(axis=1).max() <= 1
    nll = spin.standing(model, rows)["nll"]
    assert total / sum(len(row["chosen_ids"]) for row in rows) == pytest.approx(nll, abs=1e-3)


def test_a_model_diverges_from_itself_by_nothing_and_from_an_even_one_by_the_missing_entropy(bench):
    truth = bench.truth_of([("", "food"), ("", "hour")])
    same = bench.divergences(truth, truth)
    assert same == {"kl": 0.0, "mass": pytest.approx(1), "reverse_kl": 0.0}
    even = bench.divergences(truth, numpy.full((2, 8), math.log(1 / 16)))  # half of it on other answers
    entropy = -(numpy.exp(truth) * truth).sum(axis=1).mean()
    assert even["kl"] == pytest.approx(math.log(16) - entropy, abs=1e-4) and even["mass"] == 0.5
    assert even["reverse_kl"] == pytest.approx(-math.log(8) - truth.mean(), abs=1e-4)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 2.0])
def test_a_round_trained_to_its_optimum_would_have_the_slope_of_the_theorem(bench, beta):
    truth = bench.truth_of([("", "food"), ("", "hour")])
    before = numpy.log(numpy.random.default_rng(0).dirichlet(numpy.ones(8), size=2))
    after = before + (truth - before) / beta
    after -= numpy.log(numpy.exp(after).sum(axis=1, keepdims=True))
    found = bench.slope(truth, before, after)["slope"]
    assert found == pytest.approx(1 - 1 / beta, abs=1e-4)


@pytest.mark.slow
def test_the_start_is_that_of_its_training_and_sft_takes_as_many_steps_as_the_rounds(bench, engine, base, tmp_path):
    regime, case = bench.SMOKE.regime, bench.SMOKE.cases[0]
    start = bench.train_start(tmp_path, regime, 1)
    run = bench.play(tmp_path, regime, 1, case)
    assert read_json(start / "facts.json")["train"]["steps"] == regime.start_steps
    loss = read_json(start / "facts.json")["eval"]["after"]["loss"]
    assert run["start"]["nll"] == pytest.approx(loss, abs=5e-3)  # the trainer averages over batches
    assert len(run["rounds"]) == len(run["sft"]) == regime.rounds
    assert all(0 < each["kl"] < 100 for each in run["rounds"])
    assert run["sft"][-1]["steps"] == sum(each["steps"] for each in run["rounds"]) > run["sft"][0]["steps"]
    assert all(0 <= each["mass"] <= 1 for each in [run["start"], *run["rounds"], *run["sft"]])


def test_the_page_shows_what_was_measured(bench):
    results = json.loads((ROOT / "benchmarks" / "results" / "spin.json").read_text())
    assert bench.table(results["runs"]) in (ROOT / "docs" / "spin.md").read_text()
    assert len(results["runs"]) == len(bench.FULL.cases) * len(bench.FULL.seeds)
