"""Answers from the model in memory, in batches without any padding, greedy or sampled.

Rows of one length share a batch: left-padded batches gave wrong answers under Unsloth (its issues #3699 and #9708). A prompt first
goes on to the next multiple of ALIGN tokens, where it meets others; a batch goes on for STRIDE tokens, then those that have ended leave
it and the rest join whatever else is as long by then. What is there already is read again at each stride, in one forward pass.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from .model import answering
from .run import say

ALIGN, STRIDE = 8, 16  # tokens
CHECKED, CHECK_TOKENS = 8, 16  # prompts, and tokens of each, that batches have to answer as single prompts do
NEAR_TIE = 0.02  # nats between two tokens either of which may be the likeliest, by the order of sums


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen; temperature 0 takes the likeliest, 1 samples from the model itself, with nothing cut off."""

    max_new_tokens: int
    temperature: float = 0.0
    batch_size: int = 32
    seed: int = 0

    def seeded(self, number: int) -> Decoding:
        """The same with the seed of another part of the work."""
        return replace(self, seed=self.seed + number)


def answer(model: Any, tokenizer: Any, prompts: list[list[int]], decoding: Decoding) -> list[list[int]]:
    """The ids that the model goes on with after each prompt, up to and with the end token where it came."""
    answers: list[list[int]] = [[] for _ in prompts]
    for number, ids in answer_as_they_end(model, tokenizer, prompts, decoding):
        answers[number] = ids
    return answers


def answer_as_they_end(
    model: Any, tokenizer: Any, prompts: list[list[int]], decoding: Decoding
) -> Iterator[tuple[int, list[int]]]:
    """(number of the prompt, its answer) for each prompt, in the order in which they end."""
    import torch

    ends = end_tokens(model, tokenizer)
    waiting: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)  # by length: (number, prompt and what follows)
    for number, prompt in enumerate(prompts):
        waiting[len(prompt)].append((number, prompt))
    torch.manual_seed(decoding.seed)
    with answering(model):
        while waiting:
            length = min(waiting)  # the shortest first, so that the others are joined
            batch, rest = waiting[length][: decoding.batch_size], waiting.pop(length)[decoding.batch_size :]
            if rest:
                waiting[length] = rest
            left = [decoding.max_new_tokens - (length - len(prompts[number])) for number, _ in batch]
            stride = ALIGN - length % ALIGN if length % ALIGN else STRIDE
            grown = go_on(model, tokenizer, [ids for _, ids in batch], min(stride, *left), decoding, ends)
            for (number, _), ids in zip(batch, grown, strict=True):
                said = ids[len(prompts[number]) :]
                if ids[-1] in ends or len(said) >= decoding.max_new_tokens:
                    yield number, said
                else:
                    waiting[len(ids)].append((number, ids))


def go_on(
    model: Any, tokenizer: Any, rows: list[list[int]], new_tokens: int, decoding: Decoding, ends: list[int]
) -> list[list[int]]:
    """Rows of one length with up to `new_tokens` more, up to and with the first end token; the model's generation_config is overruled."""
    import torch

    ids = torch.tensor(rows, device=model.device)
    sampled = {"do_sample": True, "temperature": decoding.temperature, "top_p": 1.0, "top_k": 0, "min_p": None}
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, repetition_penalty=1.0,
        eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, **(sampled if decoding.temperature else greedy),
    )  # fmt: skip
    return [row + up_to_end(more, ends) for row, more in zip(rows, out[:, ids.shape[1] :].tolist(), strict=True)]


def checked(model: Any, tokenizer: Any, prompts: list[list[int]], decoding: Decoding) -> Decoding:
    """The decoding, when batches answer a few of these prompts greedily as single prompts do; else with batches of one, and it says so.

    The prompts are cut to one length, so that they do share a batch. Another token counts as the same where both are as likely
    as NEAR_TIE allows: sums in another order may swap them.
    """
    some = [prompt[: min(map(len, prompts[:CHECKED]))] for prompt in prompts[:CHECKED]]
    greedy = Decoding(CHECK_TOKENS)
    together = answer(model, tokenizer, some, greedy)
    apart = [answer(model, tokenizer, [prompt], greedy)[0] for prompt in some]
    same = (alike(model, *each) for each in zip(some, together, apart, strict=True))
    if decoding.batch_size == 1 or all(same):
        return decoding
    say(
        "generate: batches answer otherwise than single prompts do here; one prompt at a time, which is slower and right"
    )
    return replace(decoding, batch_size=1)


def alike(model: Any, prompt: list[int], one: list[int], other: list[int]) -> bool:
    """Whether two greedy answers are the same up to a near tie."""
    import torch

    shared = len(os.path.commonprefix([one, other]))
    if shared == len(one) == len(other):
        return True
    if shared in (len(one), len(other)):
        return False
    with answering(model):
        logits = model(input_ids=torch.tensor([prompt + one[:shared]], device=model.device)).logits[0, -1].float()
    return abs(logits[one[shared]] - logits[other[shared]]).item() <= NEAR_TIE


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
