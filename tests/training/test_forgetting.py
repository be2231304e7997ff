"""What a training costs outside of its task is seen."""

import math

import pytest

from autosloth.models.engine import load_model, load_tokenizer
from autosloth.notebook import live
from autosloth.publish.card import render_card
from autosloth.run import Run
from autosloth.settings import SFTSettings
from autosloth.training.forgetting import elsewhere, passages


@pytest.fixture(scope="module")
def model(engine, base):
    return load_model(SFTSettings(model="demo", dataset="demo"))


def test_the_perplexity_elsewhere_is_that_of_transformers_own_loss_and_grows_with_damage(model):
    import torch

    tokenizer = load_tokenizer(SFTSettings(model="demo", dataset="demo"))
    found, losses = elsewhere(model, tokenizer, 512), []
    for passage in passages():
        ids = torch.tensor([tokenizer(passage).input_ids])
        with torch.no_grad():
            losses.append((model(input_ids=ids, labels=ids).loss.item(), ids.shape[1] - 1))
    mean = sum(loss * count for loss, count in losses) / found["tokens"]
    assert found["tokens"] == sum(count for _, count in losses) > 1000
    assert math.log(found["perplexity"]) == pytest.approx(mean, abs=1e-3)
    head = model.get_output_embeddings().weight
    whole = head.detach().clone()
    with torch.no_grad():
        head.mul_(3)  # surer of the same
        worse = elsewhere(model, tokenizer, 512)
        head.copy_(whole)
    assert worse["perplexity"] > 2 * found["perplexity"] and elsewhere(model, tokenizer, 512) == found
    assert elsewhere(model, tokenizer, 16)["tokens"] <= 15 * len(passages())


def test_each_passage_is_one():
    assert len(passages()) == 28 and all(passage.strip() == passage for passage in passages())


def test_run_summary_and_card_tell_it(finished):
    run = Run.open(finished)
    before, after = (run.facts["eval"][when]["elsewhere"] for when in ("before", "after"))
    assert before["tokens"] == after["tokens"] and before["perplexity"] != after["perplexity"]
    [told] = [value for name, value in live.measured_lines(run) if name == "elsewhere"]
    assert f"({after['tokens']} tokens): " in told and told.split(": ")[1].split()[1] == "%"
    assert f"| perplexity on a fixed text outside of the task ({after['tokens']} tokens) | " in render_card(run)
