"""`python -m tests.study.coverage [TEXTS]`: how often intervals over documents hold the true difference of two runs.

The table of docs/study.md; takes some minutes.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats

from swamla.study.two_runs import ratio_interval

TRUTH = -0.01
Interval = Callable[[np.ndarray, np.ndarray], tuple[float, float]]


def drawn(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(bits apart, bytes) of documents whose sizes differ widely, and long ones of which differ less by the byte.

    The deviation of each is symmetric about TRUTH bits for each of its bytes, so the ratio of all is TRUTH.
    """
    size = rng.lognormal(8, 1, count)
    return size * (TRUTH + 0.02 * rng.standard_t(4, count) * (1000 / size) ** 0.25), size


def coverage(count: int, texts: int, interval: Interval) -> float:
    """The share of texts of `count` documents whose interval holds the truth."""
    rng = np.random.default_rng(2)
    found = [interval(*drawn(count, rng)) for _ in range(texts)]
    return float(np.mean([low <= TRUTH <= high for low, high in found]))


def ours(apart: np.ndarray, size: np.ndarray) -> tuple[float, float]:
    """The interval that is shown."""
    _, low, high = ratio_interval(apart, size, resamples=499)
    return low, high


def scipys(method: str) -> Interval:
    """An interval of scipy's as it is."""

    def ratio(apart: Any, size: Any, axis: int = -1) -> Any:
        return apart.sum(axis) / size.sum(axis)

    def interval(apart: np.ndarray, size: np.ndarray) -> tuple[float, float]:
        settings = {"paired": True, "method": method, "n_resamples": 499, "random_state": np.random.default_rng(0)}
        low, high = stats.bootstrap((apart, size), ratio, vectorized=True, **settings).confidence_interval
        return float(low), float(high)

    return interval


if __name__ == "__main__":
    texts = int(sys.argv[1]) if len(sys.argv) > 1 else 1500
    print("| documents | as used | percentile | BCa |\n|---|---|---|---|")
    for count in (10, 20, 40, 100):
        shares = [coverage(count, texts, each) for each in (ours, scipys("percentile"), scipys("BCa"))]
        print(f"| {count} | {' | '.join(f'{100 * share:.0f} %' for share in shares)} |", flush=True)
