"""How the tokens of an answer are chosen, and which of them ends it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen; temperature 0 takes the likeliest, 1 samples from the model itself, with nothing cut off."""

    max_new_tokens: int
    temperature: float = 0.0
    batch_size: int = 32
    seed: int = 0
    vllm: bool = False

    def seeded(self, number: int) -> Decoding:
        """The same with the seed of another part of the work."""
        return replace(self, seed=self.seed + number)


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
