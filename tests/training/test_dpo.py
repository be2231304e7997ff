"""Preference tuning: the loss is the one of the papers, the reference is the start, and the demo learns its manners."""

import json
import math
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file
from support.commands import DEMO, killed_after, sets

from autosloth.data.stage import prepare_data
from autosloth.errors import ModelError
from autosloth.models import adapter
from autosloth.models.engine import load_model, load_tokenizer
from autosloth.run import Run, read_json
from autosloth.settings import DPOSettings
from autosloth.training import dpo

PAIRS = [
    {"prompt": f"What is {n} + 1?", "chosen": f"It is {n + 1}.", "rejected": f"Who knows? {n} perhaps."} for n in range(12)
]  # fmt: skip
# A value other than the default for everything that reaches the trainer.
UNUSUAL = {
    **{"batch_size": 3, "gradient_accumulation": 5, "epochs": 2.0, "max_steps": 0, "learning_rate": 1.5e-6},
    **{"scheduler": "cosine", "warmup": 0.25, "optimizer": "rmsprop", "weight_decay": 0.03, "max_grad_norm": 0.7},
    **{"seed": 11, "max_length": 96, "save_steps": 7, "beta": 0.3, "loss": "robust", "label_smoothing": 0.2},
    **{"sft_weight": 0.5, "precompute_reference": True},
}
IN_TRAINER = {
    **{"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5, "num_train_epochs": 2.0, "max_steps": -1},
    **{"learning_rate": 1.5e-6, "lr_scheduler_type": "cosine", "warmup_steps": 0.25, "optim": "rmsprop"},
    **{"weight_decay": 0.03, "max_grad_norm": 0.7, "seed": 11, "data_seed": 11, "max_length": 96, "save_steps": 7},
    **{"beta": 0.3, "loss_type": ["robust", "sft"], "loss_weights": [1.0, 0.5], "label_smoothing": 0.2},
    **{"precompute_ref_log_probs": True, "fp16": False, "bf16": False, "report_to": []},
}


@pytest.fixture
def made(engine, base, tmp_path):
    """A function from settings to TRL's trainer as the stage makes it, on twelve pairs."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))

    def make(**values):
        given = {"model": "demo", "dataset": str(tmp_path / "pairs.jsonl"), "storage": str(tmp_path), "adapter": None}
        run = Run.create(DPOSettings.load(given | values))
        prepare_data(run)
        model, tokenizer = load_model(run.settings), load_tokenizer(run.settings)
        return dpo.make_trainer(run, model, tokenizer, run.rows("train"), run.rows("eval"), [])

    return make


def test_the_trainers_arguments_are_the_settings(made):
    trainer = made(**UNUSUAL)
    assert {name: getattr(trainer.args, name) for name in IN_TRAINER} == IN_TRAINER


def batch_of(trainer):
    trainer.model.eval()  # without dropout
    return next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("start", [None, "demo"])
def test_at_the_first_step_the_loss_is_ln_2_and_the_rewards_are_0(made, start, precompute):
    trainer = made(adapter=start, precompute_reference=precompute)
    loss = trainer.compute_loss(trainer.model, batch_of(trainer)).item()
    rewards = [trainer._metrics["eval"][f"rewards/{side}"][-1] for side in ("chosen", "rejected")]
    assert loss == pytest.approx(math.log(2), abs=1e-5) and rewards == pytest.approx([0, 0], abs=1e-5)


def moved(trainer, seed=0):
    """The trainer with its adapter a little away from the reference."""
    import torch

    torch.manual_seed(seed)
    for name, weights in trainer.model.named_parameters():
        if ".default." in name:
            weights.data += 0.02 * torch.randn_like(weights)
    return trainer


def logits_of(trainer, batch):
    return trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def log_probabilities(logits, batch):
    """By hand in float64: (rows,) sums over the answers' tokens, and their gradient (rows, tokens, vocabulary) by the logits."""
    logits = logits.detach().double().numpy()[:, :-1]
    mask, picked = batch["completion_mask"][:, 1:].numpy(), batch["input_ids"][:, 1:].numpy()
    shifted = logits - logits.max(-1, keepdims=True)
    logp = shifted - numpy.log(numpy.exp(shifted).sum(-1, keepdims=True))
    one_hot = numpy.eye(logits.shape[-1])[picked]
    return (logp * one_hot).sum(-1), mask, (one_hot - numpy.exp(logp)) * mask[..., None]


def sigmoid(x):
    return 1 / (1 + numpy.exp(-x))


# Loss and its derivatives by the two log-ratios, from the papers; b is beta, e the label smoothing, n and m the answers' lengths.
LOSSES = {
    "sigmoid": lambda c, r, b, e, n, m: (numpy.log1p(numpy.exp(-b * (c - r))), -b * sigmoid(-b * (c - r)), b * sigmoid(-b * (c - r))),
    "hinge": lambda c, r, b, e, n, m: (numpy.maximum(0, 1 - b * (c - r)), -b * (b * (c - r) < 1), b * (b * (c - r) < 1)),
    "ipo": lambda c, r, b, e, n, m: ((c / n - r / m - 1 / (2 * b)) ** 2, 2 * (c / n - r / m - 1 / (2 * b)) / n, -2 * (c / n - r / m - 1 / (2 * b)) / m),
    "robust": lambda c, r, b, e, n, m: (
        ((1 - e) * numpy.log1p(numpy.exp(-b * (c - r))) - e * numpy.log1p(numpy.exp(b * (c - r)))) / (1 - 2 * e),
        (-(1 - e) * b * sigmoid(-b * (c - r)) - e * b * sigmoid(b * (c - r))) / (1 - 2 * e),
        ((1 - e) * b * sigmoid(-b * (c - r)) + e * b * sigmoid(b * (c - r))) / (1 - 2 * e),
    ),
    "sppo_hard": lambda c, r, b, e, n, m: ((c - 0.5 / b) ** 2 + (r + 0.5 / b) ** 2, 2 * (c - 0.5 / b), 2 * (r + 0.5 / b)),
    "apo_zero": lambda c, r, b, e, n, m: (1 - sigmoid(b * c) + sigmoid(b * r), -b * sigmoid(b * c) * sigmoid(-b * c), b * sigmoid(b * r) * sigmoid(-b * r)),
}  # fmt: skip


@pytest.mark.parametrize("anchor", [0.0, 0.7])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradients_equal_those_computed_by_hand_in_float64(made, loss, anchor):
    import torch

    smoothing = 0.1 if loss == "robust" else 0.0
    trainer = moved(made(adapter="demo", loss=loss, label_smoothing=smoothing, sft_weight=anchor, batch_size=4))
    batch, model, beta = batch_of(trainer), trainer.model, 0.1
    with torch.no_grad():
        model.set_adapter("ref")
        before, mask, _ = log_probabilities(logits_of(trainer, batch), batch)
        model.set_adapter("default")
    logits = logits_of(trainer, batch)
    now, _, slope = log_probabilities(logits, batch)
    half, lengths = len(now) // 2, mask.sum(-1)
    ratios = ((now - before) * mask).sum(-1)
    losses, by_chosen, by_rejected = LOSSES[loss](
        ratios[:half], ratios[half:], beta, smoothing, lengths[:half], lengths[half:]
    )
    expected = losses.mean() - anchor * (now * mask)[:half].sum() / lengths[:half].sum()
    weights = numpy.concatenate([by_chosen, by_rejected]) / half
    weights = weights[:, None, None] * slope
    weights[:half] -= anchor * slope[:half] / lengths[:half].sum()
    padded = numpy.concatenate([weights, numpy.zeros_like(weights[:, :1])], axis=1)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    logits.backward(torch.from_numpy(padded).to(logits.dtype))
    by_hand = {name: p.grad.clone() for name, p in trained.items()}
    model.zero_grad()
    found = trainer.compute_loss(model, batch)
    found.backward()
    assert found.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert all(".default." in name for name in trained) and len(trained) == 56
    largest = max(gradient.abs().max() for gradient in by_hand.values())
    for name, parameter in trained.items():
        assert (parameter.grad - by_hand[name]).abs().max() <= 1e-5 * max(1.0, largest), name


def test_swapping_the_answers_negates_the_margin_and_prompt_tokens_do_not_count(made):
    import torch

    trainer = moved(made(adapter="demo"))
    batch = batch_of(trainer)
    swapped = {name: torch.cat(values.chunk(2)[::-1]) for name, values in batch.items()}
    margins = []
    for each in (batch, swapped):
        trainer.compute_loss(trainer.model, each)
        margins.append(trainer._metrics["eval"]["rewards/margins"][-1])
    assert margins[0] == pytest.approx(-margins[1], abs=1e-5) and abs(margins[0]) > 1e-3
    chosen, _ = dpo.answer_logprobs(trainer.model, batch)
    logps, mask, _ = log_probabilities(logits_of(trainer, batch), batch)
    assert chosen.tolist() == pytest.approx((logps * mask).sum(-1)[: len(chosen)].tolist(), abs=1e-4)
    assert (logps * (1 - mask)).sum() < -1  # what is left out would show


# --- The demo: rude by default, polite afterwards.


def test_the_demo_learns_its_manners_from_chance(preferred):
    facts = read_json(preferred / "facts.json")
    before, after = facts["eval"]["before"], facts["eval"]["after"]
    assert before["reward_accuracy"] == 0.5 and 0.1 < before["prefers_chosen"] < 0.9
    assert after["reward_accuracy"] > 0.9 and after["prefers_chosen"] > 0.9 and after["reward_margin"] > 0.5
    assert facts["train"]["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert after["rejected_logp"] < before["rejected_logp"] - 2 and before["kl"] == 0 < after["kl"]
    assert len(facts["train"]["rewards"]) == facts["train"]["steps"] and facts["verify"]["passed"]
    assert after["exact_match"] > 0.6 and after["samples"][0]["answer"].startswith("Gladly! ")


def test_the_reference_is_in_no_folder_that_was_saved(preferred):
    assert not [path for path in preferred.rglob("*ref*") if path.name != "reference"]
    assert [
        path.name for path in (preferred / "checkpoints").iterdir() if (path / "adapter_model.safetensors").is_file()
    ]
    assert (preferred / "adapter" / "adapter_model.safetensors").is_file()


def test_the_card_tells_what_dpo_did(preferred):
    card = (preferred / "publish" / "README.md").read_text()
    for told in (
        "tuned on the preferences in",
        "| 50.0 % | ",
        "worse answer (nats)",
        "beta 0.1",
        "- dpo\n",
        "16 pairs",
    ):
        assert told in card, told
    assert str(preferred.parent) not in card


def test_a_run_of_dpo_can_be_a_start_too(preferred, made, base):
    trainer = made(adapter=str(preferred))
    assert trainer.compute_loss(trainer.model, batch_of(trainer)).item() == pytest.approx(math.log(2), abs=1e-5)
    import torch
    from peft import load_peft_weights

    saved = load_peft_weights(str(preferred / "adapter"), device="cpu")
    assert len(saved) == 56
    loaded = dict(trainer.model.named_parameters())
    assert all(
        torch.equal(loaded[name.replace(".weight", ".default.weight")], weights) for name, weights in saved.items()
    )


@pytest.mark.slow
def test_a_run_killed_in_mid_training_ends_as_if_it_was_not(base, cli, tmp_path):
    short = {**DEMO, "max_steps": 24, "save_steps": 4, "merged": False, "quantizations": "[]", "eval_answers": 2}
    short |= {"learning_rate": 1e-4, "storage": tmp_path}
    killed_after(tmp_path / "short" / "checkpoints" / "checkpoint-8" / "trainer_state.json", "dpo", *sets(**short))
    again = cli("dpo", *sets(**short))
    assert again.returncode == 0 and "going on from checkpoint-" in again.stdout, again.stdout + again.stderr
    whole = cli("dpo", *sets(**short | {"run_name": "whole"}))
    assert whole.returncode == 0, whole.stderr
    runs = [read_json(tmp_path / name / "facts.json") for name in ("short", "whole")]
    losses = [dict(facts["train"]["losses"]) for facts in runs]
    assert losses[0].keys() == losses[1].keys() and losses[0] == pytest.approx(losses[1], abs=2e-3)
    assert runs[0]["eval"]["after"]["reward_margin"] == pytest.approx(
        runs[1]["eval"]["after"]["reward_margin"], abs=0.02
    )


# --- Where it may start.


def write_config(folder, **config):
    folder.mkdir()
    written = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "base_model_name_or_path": "x/base", **config}
    (folder / "adapter_config.json").write_text(json.dumps(written))


@pytest.mark.parametrize(
    "config, what",
    [
        (None, "holds no adapter"),
        ({"base_model_name_or_path": "x/other"}, "was trained on x/other, and `model` is x/base"),
        ({"peft_type": "IA3"}, r"no plain LoRA \(IA3\)"),
        ({"lora_bias": True}, r"no plain LoRA \(lora_bias\)"),
        ({"bias": "all"}, r"no plain LoRA \(bias\)"),
    ],
)
def test_an_adapter_that_cannot_be_the_start_is_refused_before_training(tmp_path, config, what):
    (tmp_path / "mine").mkdir() if config is None else write_config(tmp_path / "mine", **config)
    with pytest.raises(ModelError, match=what):
        adapter.starting_adapter(DPOSettings(model="x/base", adapter=str(tmp_path / "mine")))


def test_an_adapter_of_the_4_bit_form_of_the_base_fits(tmp_path):
    write_config(tmp_path / "mine", base_model_name_or_path="unsloth/Zephyr-sft-unsloth-bnb-4bit")
    save_file({}, tmp_path / "mine" / "adapter_model.safetensors")
    settings = DPOSettings(model="me/zephyr-sft", adapter=str(tmp_path / "mine"))
    assert adapter.starting_adapter(settings) == tmp_path / "mine"


def test_a_missing_adapter_is_one_of_the_problems_found_before_training(cli, base):
    result = cli("check", "dpo", *sets(model="demo", dataset="demo", adapter="/nowhere/at/all"))
    assert result.returncode == 1 and "The adapter folder /nowhere/at/all does not exist." in result.stderr


def test_questions_with_one_answer_each_are_sent_to_the_other_notebook(cli, tmp_path):
    rows = Path(tmp_path / "rows.jsonl")
    rows.write_text('{"question": "a", "answer": "b"}\n{"question": "c", "answer": "d"}\n')
    result = cli("check", "dpo", *sets(model="demo", dataset=rows))
    assert result.returncode == 1 and "AutoSloth-SFT takes them" in result.stderr and "Traceback" not in result.stderr
