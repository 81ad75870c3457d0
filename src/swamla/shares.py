"""How sure a share is of what was counted: its interval, and how many independent trials the counted ones are worth."""

import math
from collections.abc import Sequence
from statistics import NormalDist


def wilson(successes: float, trials: float, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a probability, after `successes` of `trials` independent trials.

    Unlike the interval of a normal distribution it keeps its level near 0 and 1 (Wilson 1927).
    """
    share, z = successes / trials, NormalDist().inv_cdf((1 + level) / 2)
    centre, shrink = share + z * z / (2 * trials), 1 + z * z / trials
    reach = z * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    # Exact where all or none succeed; rounding would leave 2e-16.
    return 0.0 if share == 0 else (centre - reach) / shrink, 1.0 if share == 1 else (centre + reach) / shrink


def independent_trials(right_B: Sequence[int], queries_B: Sequence[int]) -> float:
    """The number of independent queries that are as informative as the queries of these rows.

    Queries of a row may be right or wrong together, as after one wrong state. Queries are divided by the design effect
    (Kish 1965): the variance of the accuracy between rows over that of independent queries, at least 1. Rows that are
    all right or all wrong do not tell it: then each counts once.
    """
    rows, queries, share = len(right_B), sum(queries_B), sum(right_B) / sum(queries_B)
    if rows == 1 or share in (0, 1):
        return rows
    squares = sum((right - share * asked) ** 2 for right, asked in zip(right_B, queries_B, strict=True))
    between, independent = squares * rows / (rows - 1) / queries**2, share * (1 - share) / queries
    return queries / max(1.0, between / independent)
