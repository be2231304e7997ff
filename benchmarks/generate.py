"""What answers cost: `python benchmarks/generate.py`, part of `make bench`.

AutoSloth's batches without padding, beside `model.generate` one by one, and beside `model.generate` in batches of the same size, in the
order of the data, padded on the left. All three give the same answers, greedily: the model is a Llama of random weights whose
last layer is set so that each token is followed by the next lower one and the first one by the end token (`gpu_models.py`); so a prompt
that ends with the number n is answered in n + 1 tokens, whatever the layers in between cost. Prompts and answers have log-normal
lengths with a long tail, as in Alpaca. One process, the sides in turn. Writes benchmarks/results/generate.json.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gpu_meter import on_gpu
from gpu_models import BOS, EOS, PAD, SPECIAL, make_model
from sides import by_pair, in_turn, keep, options, spread

ANSWERED, ASKED = 60, 50  # tokens, medians
GREEDY = {
    "do_sample": False,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
Prompts = list[list[int]]


@dataclass(frozen=True)
class Size:
    """How many prompts (and of them one by one), rows in a batch, tokens in an answer at most, rounds; the model."""

    prompts: int = 256
    one_by_one: int = 12
    batch: int = 32
    longest: int = 256
    rounds: int = 5
    shape: str = "small"


FULL = Size()  # so that minutes suffice
LARGE = Size(shape="tinyllama-1.1b")  # on a GPU
SMOKE = Size(prompts=12, one_by_one=2, batch=4, longest=24, rounds=1, shape="tiny")


def counting_model(folder: Path, **make: Any) -> tuple[Any, Any]:
    """A Llama that counts down, and its tokenizer, loaded as AutoSloth loads them; make: as `make_model` takes it."""
    from autosloth.models import load_model, load_tokenizer
    from autosloth.models.engine import start_engine
    from autosloth.settings import SFTSettings

    start_engine()
    make_model(folder, head="counting", **make)
    settings = SFTSettings(model=str(folder), load_in_4bit=make["four_bit"], max_length=2048)
    return load_model(settings), load_tokenizer(settings)


def prompts(size: Size) -> Prompts:
    """Prompts in the order of a dataset, each ending with the number that its answer counts down from."""
    rng, made = random.Random(0), []
    for _ in range(size.prompts):
        answered = min(size.longest, max(2, round(rng.lognormvariate(0, 0.9) * ANSWERED)))
        asked = min(400, max(4, round(rng.lognormvariate(0, 0.6) * ASKED)))
        made.append([BOS, *(rng.randrange(300, 2000) for _ in range(asked - 2)), SPECIAL + answered - 2])
    return made


def expected(prompt: list[int]) -> list[int]:
    """The right answer to a prompt."""
    return [*range(prompt[-1] - 1, SPECIAL - 1, -1), EOS]


def autosloth(model: Any, tokenizer: Any, asked: Prompts, size: Size) -> Prompts:
    """The engine."""
    from autosloth.models import Decoding, answer

    return answer(model, tokenizer, asked, Decoding(size.longest, batch_size=size.batch))


def padded(model: Any, asked: Prompts, size: Size, batch: int) -> Prompts:
    """`model.generate` in batches in the order of the data, padded on the left."""
    import torch

    from autosloth.models import answering
    from autosloth.models.decoding import up_to_end

    answers = []
    with answering(model):
        for start in range(0, len(asked), batch):
            rows = asked[start : start + batch]
            longest = max(map(len, rows))
            ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows], device=model.device)
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
            out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=size.longest, **GREEDY)
            answers += [up_to_end(row, [EOS]) for row in out[:, longest:].tolist()]
    return answers


def sides(model: Any, tokenizer: Any, size: Size) -> dict[str, Callable[[], float]]:
    """What measures each side, in tokens per second; what is compiled, is compiled here."""
    asked = prompts(size)
    made = {
        "autosloth": (partial(autosloth, model, tokenizer, size=size), asked),
        "left-padded batches": (partial(padded, model, size=size, batch=size.batch), asked),
        "one by one": (partial(padded, model, size=size, batch=1), asked[: size.one_by_one]),
    }
    for side, some in made.values():
        side(some[: size.batch])
    return {name: partial(tokens_per_second, name, *side) for name, side in made.items()}


def tokens_per_second(name: str, side: Callable[[Prompts], Prompts], asked: Prompts) -> float:
    """The speed of a side, which has to give the right answers."""
    started = time.perf_counter()
    answers = side(asked)
    seconds = time.perf_counter() - started
    if answers != [expected(prompt) for prompt in asked]:
        sys.exit(f"{name} gave other answers than the model's.")
    return sum(map(len, answers)) / seconds


def main() -> None:
    smoke = options(__doc__).parse_args().smoke
    size = SMOKE if smoke else LARGE if on_gpu() else FULL
    make = {"shape": size.shape, "four_bit": False, "dtype": "float16" if on_gpu() else "float32"}
    with TemporaryDirectory() as folder:
        speeds = in_turn(size.rounds, sides(*counting_model(Path(folder), **make), size))
    print(
        f"{size.prompts} prompts (one by one: {size.one_by_one}), batches of {size.batch}, {size.rounds} rounds in turn"
    )
    print("tokens per second, and autosloth's ratio to each, round by round; medians, with the quartiles")
    ratios = {name: by_pair(speeds["autosloth"], values) for name, values in speeds.items()}
    for name, values in speeds.items():
        print(f"  {name:20} {spread(values, 0):24} autosloth is {spread(ratios[name])} times as fast")
    keep("generate", {"size": asdict(size), "tokens_per_second": speeds, "ratios": ratios}, smoke)


if __name__ == "__main__":
    main()
