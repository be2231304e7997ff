"""How good the model is on held-out rows: loss, greedy answers, preferences. What the proof of the export needs is saved here too."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from itertools import pairwise
from typing import Any

from ..data import IGNORED
from ..errors import ModelError, SettingsError
from ..models import Decoding, answer, answering, encode_prompt, end_tokens, render_chat
from ..output import counted
from ..proof import teacher_forced, write_reference
from ..run import Run
from ..score import CONFIDENCE, FEW, METRICS, RESAMPLES, NotScored, intervals, listed
from ..settings import Settings
from .batches import evaluated
from .forgetting import elsewhere

SAMPLE_LENGTH = 400
EXAMPLES = 50  # held-out rows among which the shortest is shown as the model reads it
ANSWERS_AT_ONCE = 8  # that are generated together, where these are found to be the same as one by one
SAMPLES = 3  # questions whose answers are shown before and after


def measure_answers(
    trainer: Any, tokenizer: Any, held_out: Any, settings: Settings, at_once: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """How well the model answers: the facts, and each held-out question's prompt and greedy answer, so many at once, as token ids.

    loss is the mean negative log-likelihood of the answers' tokens, in nats; for the others see `compare_answers`.
    """
    loss = held_out_loss(trainer)
    compared, answers = compare_answers(trainer.model, tokenizer, held_out, settings, at_once)
    return {"loss": loss, "perplexity": round(math.exp(min(loss, 50)), 3), **compared}, answers


def held_out_loss(trainer: Any, rows: Any = None) -> float:
    """Mean negative log-likelihood of the held-out answers' tokens, in nats, of pairs the mean of their losses; rows: those of the trainer's that are measured, all by default. Raises ModelError when it is no number.

    The trainer's own `eval_loss` is the mean of its batches' means, in which a token of a short answer counts for more. Of several
    processes the last ones may take some rows once more, to have as many as the others.
    """
    return evaluated(trainer, lambda: mean_loss(trainer, rows))


def mean_loss(trainer: Any, rows: Any) -> float:
    """The loss of held-out rows, each token counting alike, or each pair. Raises ModelError when it is no number."""
    import torch

    trainer.model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in trainer.get_eval_dataloader(rows):
        loss, *_ = trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
        learnt = batch["labels"][:, 1:] != IGNORED if "labels" in batch else None  # the first is predicted by nothing
        count = len(batch["input_ids"]) / 2 if learnt is None else learnt.sum().item()
        sums += torch.tensor([loss.item() * count, count], dtype=torch.float64)
    total, count = trainer.accelerator.reduce(sums.to(trainer.accelerator.device)).tolist()
    return finite(total / count)


def finite(loss: float) -> float:
    """The loss, rounded. Raises ModelError when it is no number."""
    if not math.isfinite(loss):
        raise diverged("on the held-out rows")
    return round(loss, 4)


def compare_answers(
    model: Any, tokenizer: Any, held_out: Any, settings: Settings, at_once: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Greedy answers to the first held-out questions, so many at once: the facts, and each prompt and answer as token ids.

    exact_match is the share of questions whose answer is the expected text, scores what each is worth by `metric`, None where the expected text
    cannot be scored; elsewhere what `forgetting.elsewhere` finds.
    """
    facts: dict[str, Any] = {"elsewhere": elsewhere(model, tokenizer, settings.max_length)}
    rows = compared(held_out, settings)
    chats = [row["messages"] for row in rows]
    prompts = [encode_prompt(tokenizer, row["messages"][:-1], row["tools"]) for row in rows]
    answers = answer(model, tokenizer, prompts, Decoding(settings.max_new_tokens, batch_size=at_once))
    given = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]
    if chats:
        expected = [chat[-1]["content"] for chat in chats]
        facts["exact_match"] = round(sum(a == b for a, b in zip(given, expected, strict=True)) / len(given), 4)
        facts["metric"], facts["scores"] = settings.metric, score_each(settings.metric, given, expected)
        facts["answers_compared"], facts["max_new_tokens"] = len(given), settings.max_new_tokens
        facts["answers_cut"] = sum(len(ids) >= settings.max_new_tokens for ids in answers)
        facts["samples"] = [
            {"question": shortened(chat[-2]["content"]), "expected": shortened(right), "answer": shortened(text)}
            for chat, right, text in zip(chats[:SAMPLES], expected, given, strict=False)
        ]
    return facts, [{"prompt": prompt, "answer": ids} for prompt, ids in zip(prompts, answers, strict=True)]


def compared(held_out: Any, settings: Settings) -> list[dict[str, Any]]:
    """The held-out rows whose answers are compared: the first chats."""
    return [row for row in held_out.select(range(min(settings.eval_answers, len(held_out)))) if row["messages"]]


def score_each(metric: str, given: list[str], expected: list[str]) -> list[float | None]:
    """What each answer is worth, from 0 to 1; None where the expected one cannot be scored.

    >>> score_each("number", ["It is 4.", "It is 5."], ["2 + 2 = 4", "nothing"])
    [1.0, None]
    """

    def score(one: str, wanted: str) -> float | None:
        try:
            return round(METRICS[metric](one, wanted), 4)
        except NotScored:
            return None

    return list(map(score, given, expected))


def refuse_unscorable(settings: Settings, held_out: Any) -> None:
    """Raises SettingsError where none of the held-out answers that will be compared can be scored by `metric`."""
    rows, reasons = compared(held_out, settings), Counter()
    for row in rows:
        try:
            METRICS[settings.metric]("", row["messages"][-1]["content"])
        except NotScored as reason:
            reasons[str(reason)] += 1
    if rows and reasons.total() == len(rows):
        raise SettingsError(
            f"`metric: {settings.metric}` can score none of the {counted(len(rows), 'held-out answer')} that would be compared: {listed(reasons)}.",
            "Choose another metric, or rows whose answers it can score.",
        )


def gained(before: dict[str, Any], after: dict[str, Any], seed: int) -> dict[str, Any]:
    """How the scores of the same questions were before and after, and their paired difference, each as `intervals` tells it; nothing where none were scored.

    Of a run that went on with another `metric` or `eval_answers` the two cannot be paired.
    """
    scores = [side.get("scores", []) for side in (before, after)]
    if before.get("metric") != after.get("metric") or len(scores[0]) != len(scores[1]):
        return {}
    pairs = [pair for pair in zip(*scores, strict=True) if None not in pair]
    if not pairs:
        return {}
    told = dict(
        zip(("before", "after", "difference"), intervals(*zip(*pairs, strict=True), seed).values(), strict=True)
    )
    counts = {"scored": len(pairs), "answers": len(scores[0]), "few": len(pairs) < FEW}
    return {"name": after["metric"], **counts, **told, "confidence": CONFIDENCE, "resamples": RESAMPLES}


def standing(model: Any, rows: list[dict[str, Any]]) -> dict[str, float]:
    """nll: mean negative log-likelihood of the dataset's answers, in nats per token; perplexity."""
    import torch

    total, tokens = 0.0, 0
    with answering(model):
        for row in rows:
            ids, start = (
                torch.tensor([row["prompt_ids"] + row["chosen_ids"]], device=model.device),
                len(row["prompt_ids"]),
            )
            logps = torch.log_softmax(model(input_ids=ids).logits[0, start - 1 : -1].float(), dim=-1)
            total -= logps.gather(-1, ids[0, start:, None]).sum().item()
            tokens += len(row["chosen_ids"])
    return {"nll": round(total / tokens, 4), "perplexity": round(math.exp(min(total / tokens, 50)), 3)}


def style_of(answers: list[list[int]], ends: list[int]) -> dict[str, float]:
    """answers, how many; mean_length in tokens; eos_rate, the share that ended; distinct_2, different pairs of tokens per pair (arXiv 1510.03055)."""
    pairs = [pair for ids in answers for pair in pairwise(ids)]
    return {
        "answers": len(answers),
        "mean_length": round(sum(map(len, answers)) / len(answers), 2),
        "eos_rate": round(sum(ids[-1] in ends for ids in answers) / len(answers), 4),
        "distinct_2": round(len(set(pairs)) / max(1, len(pairs)), 4),
    }


def example(tokenizer: Any, held_out: Any) -> dict[str, str | None]:
    """The shortest held-out row as the model reads it: prompt, and answer with its end, both with their special tokens; None where the rows are no chats, or long."""
    texts = []
    for row in held_out.select(range(min(EXAMPLES, len(held_out)))):
        if row["messages"]:
            prompt = render_chat(tokenizer, row["messages"][:-1], answer_next=True, tools=row["tools"])
            whole = render_chat(tokenizer, row["messages"], tools=row["tools"])
            texts.append((prompt, whole.removeprefix(prompt) if whole.startswith(prompt) else None))
    prompt, answer = min(texts, key=lambda pair: sum(map(len, filter(None, pair))), default=(None, None))
    fits = len(prompt or "") + len(answer or "") <= 2 * SAMPLE_LENGTH
    return {"prompt": prompt if fits else None, "answer": answer if fits else None}


def shortened(text: str) -> str:
    """A text of at most SAMPLE_LENGTH characters: samples reach the card, and rows may be long."""
    return text if len(text) <= SAMPLE_LENGTH else text[:SAMPLE_LENGTH] + " ..."


def save_reference(run: Run, model: Any, tokenizer: Any, held_out: Any, answers: list[dict[str, Any]]) -> None:
    """Write reference/: what the trained model says, so that the exported file can be held against it without loading the model again.

    The distributions are those of held-out rows and, where they are too few, of training rows.
    """
    rows = (row["input_ids"] for row in itertools.chain(held_out, run.rows("train")))
    texts = list(held_out.select_columns(["messages", "tools", "text", "input_ids"]))
    with answering(model):
        write_reference(
            run.fresh("reference"), tokenizer, texts, answers, end_tokens(model, tokenizer), is_four_bit(model),
            teacher_forced(model, rows),
        )  # fmt: skip


def is_four_bit(model: Any) -> bool:
    """Whether the base was loaded in 4 bit."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model.config, "quantization_config", None))


def diverged(when: str) -> ModelError:
    """The error of a loss that is no number."""
    todo = "Lower `learning_rate` (and `lora_alpha`, if it was raised), and run again."
    return ModelError(f"The loss is no number {when}: training diverged.", todo)
