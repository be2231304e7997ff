"""Answers from the model in memory, greedy or sampled, in batches that need no padding and stay full.

Rows of one length share a batch: left-padded batches gave wrong answers under Unsloth (its issues #3699 and #9708). A batch begins with the
shortest prompts and walks up the lengths; where rows have ended, prompts that are as long as the batch is by then take their places. A
batch that is half empty is put aside, keys and values kept, while shorter prompts begin, and goes on with them when they are as long.
"""

from __future__ import annotations

import os
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..output import say
from .decoding import Decoding, end_tokens, up_to_end
from .engine import answering
from .vllm import vllm_answers

CHECKED, CHECK_TOKENS = 8, 16  # prompts, and tokens of each, that batches have to answer as single prompts do
NEAR_TIE = 0.02  # nats between two tokens either of which may be the likeliest, by the order of sums


def answer(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    decoding: Decoding,
    tell: Callable[[list[int]], None] = lambda ids: None,
) -> list[list[int]]:
    """The ids that the model goes on with after each prompt, up to and with the end token where it came; `tell` hears of each as it ends."""
    answers: list[list[int]] = [[] for _ in prompts]
    for number, ids in answer_as_they_end(model, tokenizer, prompts, decoding):
        answers[number] = ids
        tell(ids)
    return answers


def answer_as_they_end(
    model: Any, tokenizer: Any, prompts: list[list[int]], decoding: Decoding
) -> Iterator[tuple[int, list[int]]]:
    """(number of the prompt, its answer) for each prompt, in the order in which they end."""
    import torch

    if decoding.vllm:
        yield from enumerate(vllm_answers(model, prompts, decoding, end_tokens(model, tokenizer)))
        return
    torch.manual_seed(decoding.seed)
    with answering(model):
        yield from Line(model, tokenizer, prompts, decoding).answers()


@dataclass
class Group:
    """Rows of one length that go on together.

    numbers: the prompt that each row began with; ids: (rows, length); cache: the keys and values of all tokens but the last, by layer,
    each (rows, heads, length - 1, size); None before the first token, and for models that keep something else or not all of it,
    such as those with a sliding window that the rows have outgrown: these read the rows again when they go on.
    """

    numbers: list[int]
    ids: Any
    cache: list[tuple[Any, Any]] | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def only(self, places: list[int]) -> Group:
        """The rows in these places."""
        if len(places) == len(self):
            return self
        cache = self.cache and [(keys[places], values[places]) for keys, values in self.cache]
        return Group([self.numbers[place] for place in places], self.ids[places], cache)

    def joined(self, other: Group) -> Group:
        """Both, which are of one length, as one."""
        import torch

        cache = None
        if self.cache and other.cache:
            cache = [
                tuple(map(torch.cat, zip(*both, strict=True))) for both in zip(self.cache, other.cache, strict=True)
            ]
        return Group(self.numbers + other.numbers, torch.cat([self.ids, other.ids]), cache)


def kept(cache: Any, tokens: int) -> list[tuple[Any, Any]] | None:
    """What generate() leaves: keys and values by layer, where each layer has them of so many tokens."""
    pairs = cache if isinstance(cache, (list, tuple)) else [  # the former by Unsloth's decoding on a GPU
        (getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in getattr(cache, "layers", [])
    ]  # fmt: skip
    whole = all(keys is not None and keys.shape[-2] == tokens for keys, *_ in pairs)
    return [(keys, values) for keys, values, *_ in pairs] if pairs and whole else None


class Line:
    """The prompts that wait, by length, and the batch that picks them up.

    At most as many rows as a batch holds, and half as many again, wait with their keys and values kept.
    """

    def __init__(self, model: Any, tokenizer: Any, prompts: list[list[int]], decoding: Decoding):
        self.model, self.tokenizer, self.prompts, self.decoding = model, tokenizer, prompts, decoding
        self.ends, self.size = end_tokens(model, tokenizer), decoding.batch_size
        self.asked: dict[int, list[int]] = defaultdict(list)  # numbers of prompts that are not begun, by length
        self.aside: dict[int, Group] = {}  # begun and waiting, by length
        for number, prompt in enumerate(prompts):
            self.asked[len(prompt)].append(number)

    def answers(self) -> Iterator[tuple[int, list[int]]]:
        """(number of the prompt, its answer), in the order in which they end."""
        while self.asked or self.aside:
            group = self.board(min([*self.asked, *self.aside]), self.size)
            while len(group):
                group = yield from self.leave(self.go_on(group))
                group = yield from self.fill(group)
                if self.waits_well(group):
                    self.put_aside(group)
                    break

    def board(self, length: int, places: int) -> Group:
        """Up to so many rows of this length: those that have begun, or else new ones."""
        import torch

        if length in self.aside:
            group = self.aside.pop(length)
            if len(group) > places:
                self.aside[length] = group.only(list(range(places, len(group))))
            return group.only(list(range(min(places, len(group)))))
        numbers, rest = self.asked[length][:places], self.asked.pop(length)[places:]
        if rest:
            self.asked[length] = rest
        return Group(numbers, torch.tensor([self.prompts[n] for n in numbers], device=self.model.device))

    def leave(self, group: Group) -> Iterator[tuple[int, list[int]]]:
        """Give out the answers that have ended or are as long as they may be; returns the other rows."""
        going = []
        for place, (number, ids) in enumerate(zip(group.numbers, group.ids.tolist(), strict=True)):
            said = up_to_end(ids[len(self.prompts[number]) :], self.ends)
            if said and (said[-1] in self.ends or len(said) >= self.decoding.max_new_tokens):
                yield number, said
            else:
                going.append(place)
        return group.only(going)

    def fill(self, group: Group) -> Iterator[tuple[int, list[int]]]:
        """Take in whoever is as long as the group: rows that were put aside, and prompts that come to this length with their first token."""
        length = group.length
        if length in self.aside and 0 < len(group) < self.size:
            group = group.joined(self.board(length, self.size - len(group)))
        if length - 1 in self.asked and length - 1 not in self.aside and 0 < len(group) < self.size:
            begun = yield from self.leave(self.go_on(self.board(length - 1, self.size - len(group)), 1))
            group = group.joined(begun) if len(begun) else group
        return group

    def waits_well(self, group: Group) -> bool:
        """Whether the group is small enough to wait for others that are no longer than it, and the memory holds it."""
        shorter = any(length <= group.length for length in [*self.asked, *self.aside])
        return 0 < len(group) <= self.size // 2 and shorter and sum(map(len, self.aside.values())) < self.size

    def put_aside(self, group: Group) -> None:
        """Keep the group until others are as long."""
        there = self.aside.pop(group.length, None)
        self.aside[group.length] = there.joined(group) if there else group

    def go_on(self, group: Group, new_tokens: int | None = None) -> Group:
        """The group with more tokens, or as much of it as the GPU's memory holds; the batch stays as small then, the other rows are put aside."""
        import torch
        from accelerate.utils.memory import clear_device_cache

        try:
            return self.more_tokens(group, new_tokens)
        except torch.OutOfMemoryError as error:
            if len(group) == 1:
                raise
            traceback.clear_frames(error.__traceback__)  # they hold what filled it
        self.size = len(group) // 2
        say(f"generate: no GPU memory for a batch of {len(group)}; going on with {self.size}")
        for waiting in (group, *self.aside.values()):
            waiting.cache = None
        clear_device_cache(garbage_collection=True)
        self.put_aside(group.only(list(range(self.size, len(group)))))
        return self.go_on(group.only(list(range(self.size))), new_tokens)

    def more_tokens(self, group: Group, new_tokens: int | None) -> Group:
        """The group with more tokens: so many, or until it is time to let rows leave or others in; the model's generation_config is overruled."""
        import torch
        from transformers import DynamicCache

        left = min(self.decoding.max_new_tokens - group.length + len(self.prompts[number]) for number in group.numbers)
        sampled = {"do_sample": True, "temperature": self.decoding.temperature, "top_p": 1.0, "top_k": 0, "min_p": None}
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        cache = group.cache and DynamicCache(group.cache, config=self.model.config)
        out = self.model.generate(
            input_ids=group.ids, attention_mask=torch.ones_like(group.ids), past_key_values=cache,
            max_new_tokens=new_tokens or left, repetition_penalty=1.0, eos_token_id=self.ends,
            pad_token_id=self.tokenizer.pad_token_id, stopping_criteria=[] if new_tokens else [self.time_to_stop(group)],
            return_dict_in_generate=True, **(sampled if self.decoding.temperature else greedy),
        )  # fmt: skip
        return Group(group.numbers, out.sequences, kept(out.past_key_values, out.sequences.shape[1] - 1))

    def time_to_stop(self, group: Group) -> Any:
        """A stopping criterion of transformers for the whole group: others are as long and there is room, or half of its rows have ended."""
        import torch

        stops = {length + 1: len(numbers) for length, numbers in self.asked.items()}
        stops |= {length: len(rows) + stops.get(length, 0) for length, rows in self.aside.items()}
        ends, begin = torch.tensor(self.ends, device=group.ids.device), group.length

        def stop(ids: Any, scores: Any, **_: Any) -> Any:
            ended = torch.isin(ids[:, begin:], ends).any(dim=1).sum().item()
            room, others = self.size - len(group) + ended, stops.get(ids.shape[1], 0)
            enough = room >= min(others, self.size // 4 or 1) if others else ended >= (len(group) + 1) // 2
            return torch.full((len(ids),), enough, device=ids.device)

        return stop


def checked(model: Any, tokenizer: Any, prompts: list[list[int]], decoding: Decoding) -> Decoding:
    """The decoding, when it answers a few of these prompts greedily as single prompts do; else one that does, and it says so.

    The prompts are cut to one length, so that they do share a batch. Another token counts as the same where both are as likely
    as NEAR_TIE allows: sums in another order may swap them.
    """
    if decoding.batch_size == 1 and not decoding.vllm:
        return decoding
    some = [prompt[: min(map(len, prompts[:CHECKED]))] for prompt in prompts[:CHECKED]]
    together = answer(model, tokenizer, some, Decoding(CHECK_TOKENS, vllm=decoding.vllm))
    apart = [answer(model, tokenizer, [prompt], Decoding(CHECK_TOKENS))[0] for prompt in some]
    if all(alike(model, *each) for each in zip(some, together, apart, strict=True)):
        return decoding
    if decoding.vllm:
        say("generate: vLLM gives other answers than the model itself, so it is not used")
        return checked(model, tokenizer, prompts, replace(decoding, vllm=False))
    say(
        "generate: batches give other answers here than single prompts, so prompts are answered one by one, which is slower and right"
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
