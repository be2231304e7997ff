"""The sides of `dpo.py`: AutoSloth's trainer of pairs, with its own batches and with random ones."""

from __future__ import annotations

from typing import Any

import gpu_sides
from sides import Case, play


def autosloth(**case: Any) -> Case:
    """The trainer as it is."""
    case |= {"road": "dpo", "name": "pairs", "gpu_gb": 16.0}
    return gpu_sides.autosloth(case | gpu_sides.prepare(case))


def random(**case: Any) -> Case:
    """The same with batches made at random."""
    from autosloth.models.engine import start_engine

    start_engine()
    from autosloth.training import dpo

    arguments = dpo.pair_arguments
    dpo.pair_arguments = lambda *given: arguments(*given) | {"train_sampling_strategy": "random"}
    return autosloth(**case)


if __name__ == "__main__":
    play([autosloth, random])
