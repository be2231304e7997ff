"""What preference tuning gains from batches of pairs of like length: `python benchmarks/dpo.py`, part of `make bench`.

The same trainer on the same pairs, as long as UltraFeedback's, in the A100 profile (16 pairs a step in four batches), on a small model of random
weights: with the batches that AutoSloth makes, and with random ones (`dpo_sides.py`). A step has the same pairs on both sides, so the losses
must agree. Writes benchmarks/results/dpo.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from sides import Case, by_pair, column, in_turn, keep, losses_apart, measure, options, spread

SETTINGS = {
    **{"profile": "a100", "precision": "float32", "optimizer": "adamw_torch_fused", "load_in_4bit": False, "lora_r": 4, "lora_alpha": 4},
    **{"max_length": 1024, "warmup": 1},
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """Pairs of trainings of so many steps, on so many rows of these median lengths in tokens, and the model's shape in `gpu_models.py`."""

    pairs: int
    steps: int
    rows: int
    shape: str
    lengths: Case


FULL = Size(pairs=5, steps=6, rows=400, shape="small", lengths={})
SMOKE = Size(pairs=1, steps=4, rows=110, shape="tiny", lengths={"prompt": 10, "answer": 20})


def trained(side: str, size: Size) -> Case:
    """One training of a side: seconds of its timed steps, padding and losses."""
    make = {"shape": size.shape, "four_bit": False, "dtype": "float32"}
    case = {"make": make, "model": "base", "rows": size.rows, "lengths": size.lengths, "settings": SETTINGS}
    told = measure("dpo_sides.py", side, **case, steps=size.steps)
    return {"seconds": sum(told["steps_s"]), **{name: told[name] for name in ("steps_s", "padding", "losses")}}


def main() -> None:
    smoke = options(__doc__).parse_args().smoke
    size = SMOKE if smoke else FULL
    runs = in_turn(size.pairs, {side: partial(trained, side, size) for side in ("autosloth", "random")})
    apart = losses_apart(runs)
    print(f"{size.pairs} pairs of trainings in turn; medians, with the quartiles")
    for side, measured in runs.items():
        steps = len(measured[0]["steps_s"])
        a_step = spread([seconds / steps for seconds in column(measured, "seconds")], 2, " s")
        print(f"  {side:9} a step {a_step}, padding {measured[0]['padding']:.0%}")
    speedups = by_pair(column(runs["random"], "seconds"), column(runs["autosloth"], "seconds"))
    print(f"  autosloth beside random, pair by pair: {spread(speedups)} x as many pairs a second; losses at most {apart:.1e} apart")  # fmt: skip
    keep("dpo", {"runs": runs, "speedups": speedups, "losses_apart": apart}, smoke)


if __name__ == "__main__":
    main()
