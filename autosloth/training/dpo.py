"""Preference tuning (DPO): TRL's DPOTrainer on pairs, held to the adapter as it was when training began.

Given a PEFT model and no reference model, trl 1.15 copies the adapter to one named `ref` and scores the reference with it. A fresh
adapter changes nothing, so its copy is the base; the copy of a trained adapter is the model that it made.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from ..distributed import processes
from ..models import answering, choose_precision
from ..run import Run
from ..settings import DPOSettings, SPINSettings
from .batches import evaluated
from .measure import compare_answers, finite
from .train import READS, adapter_unrounded, train, training_arguments, training_stage, without_bars

KL_ROWS = 32  # held-out answers that the divergence from the reference is measured on
COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids"]


@training_stage(reads=(*READS, "beta", "loss", "sft_weight", "label_smoothing", "precompute_reference"))
def train_preferences(run: Run) -> None:
    """Preference tuning: train the adapter from the last checkpoint on (or from the start) and write adapter/."""
    train(run, make_trainer, measure_preferences)


def make_trainer(run: Run, model: Any, tokenizer: Any, train: Any, held_out: Any, callbacks: list[Any]) -> Any:
    """TRL's DPOTrainer for the settings of a run."""
    import torch

    dtype, _ = choose_precision(run.settings)
    arguments = dpo_arguments(run.settings, run.path("checkpoints"), dtype, torch.cuda.is_available())
    return pair_trainer(arguments, model, tokenizer, train, held_out, callbacks)


def pair_trainer(
    arguments: dict[str, Any], model: Any, tokenizer: Any, train: Any, held_out: Any, callbacks: list[Any]
) -> Any:
    """TRL's DPOTrainer on pairs that are tokenised already; `ref` is in the model and never in what it saves.

    The batches of a step hold pairs of like length, and fewer of the long ones; each pair counts the same in its loss. What the trainer logs
    besides is a mean over batches.
    """
    from trl import DPOConfig, DPOTrainer

    class PairTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # by pairs.py, whose prompts are those of generation; trl 1.15 would render them by itself

        def _get_train_sampler(self, *arguments: Any) -> Any:
            sampler = super()._get_train_sampler(*arguments)
            if self.args.train_sampling_strategy == "batch_rebalance":
                sampler.seed = self.args.data_seed  # transformers 5.17 leaves it at 42
            return sampler

        def get_batch_samples(self, *arguments: Any) -> tuple[list[Any], Any]:
            batches, items = super().get_batch_samples(*arguments)
            self.pairs_a_batch = sum(len(batch["input_ids"]) for batch in batches) / 2 / max(1, len(batches))
            return batches, items

        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
            loss = super().compute_loss(model, inputs, *arguments, **named)
            return loss * (len(inputs["input_ids"]) / 2 / self.pairs_a_batch) if model.training else loss

    with adapter_unrounded(model):
        trainer = PairTrainer(
            model=model,
            args=DPOConfig(**arguments),
            train_dataset=with_lengths(train.select_columns(COLUMNS)),
            eval_dataset=held_out.select_columns(COLUMNS),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    # A checkpoint with a folder `ref` would be resumed from that alone (transformers 5.17, Trainer._load_from_checkpoint).
    model.save_pretrained = functools.partial(model.save_pretrained, selected_adapters=["default"])
    return without_bars(trainer)


def with_lengths(pairs: Any) -> Any:
    """The rows with a column `length`: tokens of a prompt and the longer answer."""
    import pyarrow.compute as compute

    prompt, *answers = (compute.list_value_length(pairs.with_format("arrow")[:][name]) for name in COLUMNS)
    return pairs.add_column("length", compute.add(prompt, compute.max_element_wise(*answers)).to_pylist())


def dpo_arguments(settings: DPOSettings, checkpoints: Path, dtype: str, gpu: bool) -> dict[str, Any]:
    """Every value that preference tuning depends on, as DPOConfig takes it."""
    return pair_arguments(settings, checkpoints, dtype, gpu) | {
        "label_smoothing": settings.label_smoothing,
        "precompute_ref_log_probs": settings.precompute_reference,
    }


def pair_arguments(settings: DPOSettings | SPINSettings, checkpoints: Path, dtype: str, gpu: bool) -> dict[str, Any]:
    """What learning from pairs depends on, in DPO and in self-play."""
    anchor, several = settings.sft_weight > 0, settings.rows_per_step > settings.rows_at_once and processes() == 1
    return training_arguments(settings, checkpoints, dtype, gpu) | {
        "train_sampling_strategy": "batch_rebalance" if several else "random",
        "beta": settings.beta,
        "loss_type": [settings.loss, "sft"] if anchor else [settings.loss],
        "loss_weights": [1.0, settings.sft_weight] if anchor else None,
        "label_smoothing": 0.0,
        "precompute_ref_log_probs": False,
        "precompute_ref_batch_size": None,
        "truncation_mode": "keep_start",
        "disable_dropout": True,
        "f_divergence_type": "reverse_kl",
        "use_weighting": False,
        "sync_ref_model": False,
        "padding_free": False,
    }


def measure_preferences(
    trainer: Any, tokenizer: Any, held_out: Any, settings: DPOSettings, at_once: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """How well the model tells the better answers of the held-out pairs from the worse: the facts, and answers as `compare_answers` gives them.

    loss: the one that is trained; chosen_logp, rejected_logp: mean log-probability of a whole answer, in nats; reward_margin and
    reward_accuracy: of the implicit rewards beta * log(p / p_reference) (arXiv 2305.18290, eq. 5), a tie counting half;
    prefers_chosen: share of pairs whose better answer is the likelier one; chosen_change, rejected_change: of the log-probabilities
    since the reference, chosen_error: the standard error of the former; kl: mean divergence from the reference over the tokens
    of better answers, in nats.
    """
    facts = {"pairs": len(held_out), **preferences(trainer, settings.beta)}
    facts["kl"] = divergence(trainer.model, held_out.select(range(min(KL_ROWS, len(held_out)))))
    compared, answers = compare_answers(trainer.model, tokenizer, held_out, settings, at_once)
    return facts | compared, answers


def preferences(trainer: Any, beta: float) -> dict[str, float]:
    """Loss, log-probabilities, implicit rewards and accuracies over the trainer's held-out pairs; see `measure_preferences`.

    Raises ModelError when the loss is no number, or a single pair is too much for the GPU's memory.
    """
    loss = evaluated(trainer, trainer.evaluate)["eval_loss"]  # a mean over pairs; that of an SFT anchor, over batches
    return {"loss": finite(loss), **evaluated(trainer, lambda: rewarded(trainer, beta))}


def rewarded(trainer: Any, beta: float) -> dict[str, float]:
    """What `preferences` tells besides the loss."""
    import torch

    trainer.model.eval()
    found = []
    for batch in trainer.get_eval_dataloader():
        with torch.no_grad(), trainer.accelerator.autocast():
            logps = *answer_logprobs(trainer.model, batch), *trainer.compute_ref_log_probs(trainer.model, batch)
        found.append(
            trainer.accelerator.gather_for_metrics(torch.stack(logps, dim=1)).float().cpu()
        )  # of all processes
    chosen, rejected, *before = torch.cat(found).T
    margins = beta * ((chosen - before[0]) - (rejected - before[1]))
    won = (margins > 0).float() + 0.5 * (margins == 0)
    found = {"chosen_logp": chosen, "rejected_logp": rejected, "reward_margin": margins, "reward_accuracy": won}
    found["prefers_chosen"] = (chosen > rejected).float()
    found |= {"chosen_change": chosen - before[0], "rejected_change": rejected - before[1]}
    error = (found["chosen_change"].std(correction=0) / len(chosen) ** 0.5).item()
    return {name: round(values.mean().item(), 4) for name, values in found.items()} | {"chosen_error": round(error, 4)}


def answer_logprobs(model: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    """Log-probabilities of the chosen and of the rejected answers, each (pairs,), in nats, as trl 1.15's loss sums them."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model(**inputs, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum(dim=1).chunk(2)


def divergence(model: Any, rows: Any) -> float:
    """Mean Kullback-Leibler divergence, in nats, of the model's next-token distributions from the reference's, over the better answers."""
    import torch

    total, tokens = 0.0, 0
    with answering(model):
        for row in rows:
            ids, start = torch.tensor([row["input_ids"]], device=model.device), len(row["prompt_ids"])
            now = torch.log_softmax(model(input_ids=ids).logits[0, start - 1 : -1].float(), dim=-1)
            model.set_adapter("ref")
            before = torch.log_softmax(model(input_ids=ids).logits[0, start - 1 : -1].float(), dim=-1)
            model.set_adapter("default")
            total += (now.exp() * (now - before)).sum().item()
            tokens += len(now)
    return round(max(total / tokens, 0.0), 5)
