"""How sure a mean score is: percentile bootstrap over the questions (Efron 1979), paired for a difference (Koehn 2004, aclanthology.org/W04-3250)."""

from __future__ import annotations

from collections.abc import Sequence

RESAMPLES, CONFIDENCE = 10_000, 0.95
FEW = 30  # questions below which such an interval is too narrow to be trusted
AT_ONCE = 1_000_000  # indices that are held in memory


def intervals(base: Sequence[float], tuned: Sequence[float], seed: int) -> dict[str, dict[str, float]]:
    """For `base`, `tuned` and their `difference` (tuned less base): mean, low and high, the bounds of the interval at CONFIDENCE.

    base, tuned: the scores of the same questions, in the same order, at least one. Each resample draws the questions once for both.
    """
    import numpy as np

    scores = np.array([base, tuned, np.subtract(tuned, base)], dtype=np.float64)
    count, random, means = scores.shape[1], np.random.default_rng(seed), []
    for start in range(0, RESAMPLES, step := max(1, AT_ONCE // count)):
        drawn = random.integers(count, size=(min(step, RESAMPLES - start), count))
        means.append(scores[:, drawn].mean(axis=2))
    bounds = np.quantile(np.concatenate(means, axis=1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=1)
    return {
        name: {"mean": round(float(mean), 4), "low": round(float(low), 4), "high": round(float(high), 4)}
        for name, mean, low, high in zip(("base", "tuned", "difference"), scores.mean(axis=1), *bounds, strict=True)
    }
