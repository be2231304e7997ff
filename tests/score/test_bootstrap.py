"""The intervals against what is known of them."""

import itertools

import numpy as np
import pytest

from autosloth.score.bootstrap import intervals


def test_of_few_questions_the_bounds_are_those_of_every_possible_resample():
    base, tuned = [0.0, 0.2, 1.0, 0.5], [0.1, 1.0, 1.0, 0.9]
    found = intervals(base, tuned, seed=1)
    drawn = np.array([*itertools.product(range(4), repeat=4)])  # all 256, each as likely
    for name, scores in (("base", base), ("tuned", tuned), ("difference", np.subtract(tuned, base))):
        low, high = np.quantile(np.array(scores)[drawn].mean(axis=1), [0.025, 0.975])
        assert found[name] == pytest.approx({"mean": np.mean(scores), "low": low, "high": high}, abs=0.03), name


def test_the_difference_is_paired():
    """Of two that part by the same everywhere nothing is in doubt, however they scatter."""
    base = np.linspace(0, 0.9, 50)
    found = intervals(base, base + 0.1, seed=3)
    assert found["difference"] == {"mean": 0.1, "low": 0.1, "high": 0.1}
    assert found["base"]["high"] - found["base"]["low"] > 0.1


def test_the_seed_decides():
    some = ([0.0, 1.0, 0.3] * 9, [1.0, 1.0, 0.0] * 9)
    assert intervals(*some, seed=1) == intervals(*some, seed=1) != intervals(*some, seed=2)
