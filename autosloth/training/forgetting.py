"""What a training costs outside of its task: how likely the model finds a fixed text, before and after.

The text lies beside the package's templates: sentences in the public domain (Lincoln 1863, Austen 1813, Carroll 1865, Melville 1851,
Shakespeare 1603, Darwin 1859) and our own: facts, letters, sums, code, other languages. It is no benchmark; it is the same before and after.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

from ..models import answering


@functools.cache
def passages() -> list[str]:
    """The passages of the text; a blank line parts them, so those of code hold none."""
    text = Path(__file__).with_name("templates").joinpath("elsewhere.txt").read_text(encoding="utf-8")
    return text.strip().split("\n\n")


def without_end(ids: list[int], tokenizer: Any) -> list[int]:
    """The ids of a passage without the end token that some tokenizers add: a training teaches when to end, which is no part of the text."""
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def elsewhere(model: Any, tokenizer: Any, longest: int) -> dict[str, float]:
    """How the model takes the text, passage by passage as plain text, each up to so many tokens: perplexity over tokens; how many these are, which differs by tokenizer."""
    import torch

    total, tokens = 0.0, 0
    with answering(model):
        for passage in passages():
            ids = torch.tensor([without_end(tokenizer(passage).input_ids, tokenizer)[:longest]], device=model.device)
            logps = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), dim=-1)
            total -= logps.gather(-1, ids[0, 1:, None]).sum().item()
            tokens += ids.shape[1] - 1
    return {"perplexity": round(math.exp(min(total / tokens, 50)), 3), "tokens": tokens}
