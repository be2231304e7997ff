"""Greedy answers from the model in memory, batched without any padding."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from .model import answering


def answer(
    model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int, batch_size: int
) -> list[list[int]]:
    """The ids that the model goes on with after each prompt, up to and with the end token where it came.

    Prompts of equal length share a batch: left-padded batches gave wrong answers under Unsloth (its
    issues #3699 and #9708), and buckets of one length need no padding.
    """
    buckets = defaultdict(list)
    for number, prompt in enumerate(prompts):
        buckets[len(prompt)].append(number)
    answers: list[list[int]] = [[] for _ in prompts]
    with answering(model):
        for numbers in buckets.values():
            for start in range(0, len(numbers), batch_size):
                batch = numbers[start : start + batch_size]
                for number, ids in zip(
                    batch, generate_batch(model, tokenizer, [prompts[n] for n in batch], max_new_tokens), strict=True
                ):
                    answers[number] = ids
    return answers


def generate_batch(model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Greedy answers to prompts of one length; whatever the model's generation_config samples with is overruled."""
    import torch

    ids = torch.tensor(prompts, device=model.device)
    ends = end_tokens(model, tokenizer)
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None, repetition_penalty=1.0,
        eos_token_id=ends, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return [up_to_end(answer, ends) for answer in out[:, ids.shape[1] :].tolist()]


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end an answer: the tokenizer's end token and those of the model's generation_config."""
    configured = model.generation_config.eos_token_id
    configured = [configured] if isinstance(configured, int) else configured or []
    return sorted({tokenizer.eos_token_id, *configured})


def up_to_end(ids: list[int], ends: list[int]) -> list[int]:
    """The ids up to and with the first end token.

    >>> up_to_end([5, 2, 0, 0], [2])
    [5, 2]
    """
    return next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids)
