"""Statistics of a study: differences paired by seed, their intervals and tests, and the verdict in words.

Functions on arrays work along the last axis, so that thousands of simulated studies are one call (tests/study). A
verdict is a difference, an equivalence or "undecided", with the interval: never a ranking alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from swamla.errors import MissingBackendError, require
from swamla.shares import wilson as score_interval

LEVEL = 0.95
POWER = 0.8  # with which the number of seeds that a verdict needs is estimated
MOST_SEEDS = 1000  # no more are proposed
Direction = Literal["lower", "higher"]
Kind = Literal["difference", "equivalence", "small difference", "undecided"]


class Interval(NamedTuple):
    """A mean and its interval, floats or arrays; infinite where one value says nothing of the spread."""

    mean: Any
    low: Any
    high: Any


def t_interval(values: Any, level: float = LEVEL) -> Interval:
    """Student's t-interval of the mean of `values` (…, N): it contains the true mean in a share `level` of studies."""
    values = np.asarray(values, dtype=float)
    mean, error = _mean_and_error(values)
    n = values.shape[-1]
    half = np.full_like(mean, np.inf) if n < 2 else scipy_stats().t.ppf((1 + level) / 2, n - 1) * error
    return Interval(mean, mean - half, mean + half)


def difference_test(values: Any) -> Any:
    """p of the two-sided t-test that the mean of `values` (…, N) is 0: 1 for a single value, or if all are 0."""
    values = np.asarray(values, dtype=float)
    mean, error = _mean_and_error(values)
    if values.shape[-1] < 2:
        return np.ones_like(mean)
    return 2 * scipy_stats().t.sf(np.abs(_ratio(mean, error)), values.shape[-1] - 1)


def equivalence_test(values: Any, margin: float) -> Any:
    """p of two one-sided t-tests that the mean of `values` (…, N) is outside of ±margin: small if it is inside.

    Schuirmann 1987. p ≤ .05 where the 90 % interval lies within the margin. 1 for a single value.
    """
    values = np.asarray(values, dtype=float)
    mean, error = _mean_and_error(values)
    if values.shape[-1] < 2:
        return np.ones_like(mean)
    return scipy_stats().t.sf(_ratio(margin - np.abs(mean), error), values.shape[-1] - 1)


def holm(p: Any) -> Any:
    """p-values (…, M) adjusted by Holm 1979: to reject what is ≤ α is wrong anywhere in a share ≤ α of studies."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p, axis=-1, kind="stable")
    factors = np.arange(p.shape[-1], 0, -1)
    stepped = np.maximum.accumulate(np.take_along_axis(p, order, -1) * factors, axis=-1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(stepped, 1.0), -1)
    return adjusted


def wilson(successes: int, trials: int, level: float = LEVEL) -> Interval:
    """The interval of a success rate by Wilson 1927, e.g. of seeds that learn a task: useful for few and for all.

    The rate itself is `mean`. Without trials it is unknown: 0 to 1.
    """
    require(0 <= successes <= trials, "successes", successes, f"must be 0 … trials = {trials}")
    if not trials:
        return Interval(math.nan, 0.0, 1.0)
    return Interval(successes / trials, *score_interval(successes, trials, level))


def seeds_to_decide(
    mean: float, deviation: float, margin: float, *, alpha: float = 1 - LEVEL, power: float = POWER
) -> int | None:
    """Seeds with which a study would end with a difference or an equivalence, each in a share `power` of cases.

    mean, deviation: of the paired differences, as if those seen were the true ones. None if more than `MOST_SEEDS`.
    """
    if deviation == 0:
        return 2

    def decides(n: int) -> bool:
        return max(_powers(mean, deviation, margin, n, alpha)) >= power

    if not decides(MOST_SEEDS):
        return None
    low, high = 1, MOST_SEEDS  # the first does not decide, the last does
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decides(middle) else (middle, high)
    return high


def _powers(mean: float, deviation: float, margin: float, n: int, alpha: float) -> tuple[float, float]:
    """With which `n` seeds show a difference, and an equivalence."""
    return _power_of_difference(mean, deviation, n, alpha), _power_of_equivalence(mean, deviation, margin, n, alpha)


def _power_of_difference(mean: float, deviation: float, n: int, alpha: float) -> float:
    critical = scipy_stats().t.ppf(1 - alpha / 2, n - 1)
    return _beyond(critical, n, abs(mean) / deviation)


def _power_of_equivalence(mean: float, deviation: float, margin: float, n: int, alpha: float) -> float:
    """A lower bound, close where the power is high: one minus the chances that either one-sided test fails."""
    critical = scipy_stats().t.ppf(1 - alpha, n - 1)
    sides = [_beyond(critical, n, (margin + sign * mean) / deviation) for sign in (-1, 1)]
    return max(0.0, sum(sides) - 1)


def _beyond(critical: float, n: int, effect: float) -> float:
    """The probability that a t-statistic of n values exceeds `critical`; effect: the true mean in deviations."""
    shift = effect * math.sqrt(n)
    if shift > 30 + critical:  # where scipy's series ends in NaN
        return 1.0
    return float(scipy_stats().nct.sf(critical, n - 1, shift)) if shift > 0 else 0.0


def _mean_and_error(values: np.ndarray) -> tuple[Any, Any]:
    """The mean along the last axis, and its standard error, exactly 0 for equal values."""
    n = values.shape[-1]
    require(n > 0, "values", n, "must have at least one seed")
    mean = values.mean(-1)
    if n < 2:
        return mean, np.full_like(mean, np.inf)
    error = values.std(-1, ddof=1) / math.sqrt(n)
    same = np.ptp(values, axis=-1) == 0  # their mean is rounded, their deviation from it not 0
    return np.where(same, values[..., 0], mean), np.where(same, 0.0, error)


def _ratio(mean: Any, error: Any) -> Any:
    """mean / error; 0 for 0 / 0, so that seeds that are all equal are no difference."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(mean / error, nan=0.0, posinf=np.inf, neginf=-np.inf)


def scipy_stats() -> Any:
    """`scipy.stats`. Raises `MissingBackendError`, with the install command, without scipy."""
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingBackendError(
            f"the statistics of studies need scipy: pip install 'swamla[lab]' ({error})"
        ) from error
    return stats


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What a study measures. direction: whether lower or higher is better.  margin: of differences too small to matter,
    in the axis's unit, stated before the study runs.
    """

    name: str = "bits per byte"
    direction: Direction = "lower"
    margin: float = 0.01

    def __post_init__(self) -> None:
        require(bool(self.name), "axis", self.name, "must name what is measured, e.g. bits per byte")
        require(0 < self.margin < math.inf, "margin", self.margin, "must be > 0, e.g. 0.01")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An arm against the reference.

    seeds: those that both have.  differences: arm minus reference at each.  interval: of their mean, of one comparison
    alone.  p, p_equivalence: of both tests, adjusted by Holm over the study's comparisons, each test for itself.
    more_seeds: about how many more an undecided comparison needs; None if decided, or if more than `MOST_SEEDS`.
    comparisons: those that p is adjusted for.  correlation: of both arms' scores over the seeds, by which pairing
    gains; None for fewer than three.
    """

    arm: str
    reference: str
    axis: Axis
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    interval: Interval
    p: float
    p_equivalence: float
    more_seeds: int | None
    comparisons: int
    level: float = LEVEL
    correlation: float | None = None

    @property
    def alone(self) -> tuple[float, float]:
        """p of both tests without the adjustment, of a difference and of an equivalence."""
        return _tests(self.differences, self.axis.margin)

    @property
    def kind(self) -> Kind:
        """The verdict in a word."""
        return _kind(self.p, self.p_equivalence, 1 - self.level)

    def words(self) -> str:
        """The verdict in sentences, with the interval, the number of seeds and p."""
        unit, margin, n = self.axis.name, self.axis.margin, len(self.seeds)
        if n < 2:
            seen = f"differ by {self.differences[0]:+.4f} {unit} at one seed" if n else "have no seed in common"
            return (
                f"{self.arm} and {self.reference}: undecided. They {seen}, which says nothing of the spread between "
                f"seeds: at least {2 - n} more seed{'s' * (n == 0)} needed."
            )
        mean, low, high = (float(value) for value in self.interval)
        lower = (mean < 0) == (self.axis.direction == "lower")
        of = f"{self.level:.0%} interval of the difference {low:+.4f} to {high:+.4f}, {n} seeds"
        p = self.p_words()
        if self.kind == "difference":
            better = "better" if lower else "worse"
            size = f"{self.arm} is {better} than {self.reference} by {abs(mean):.4f} {unit}"
            return f"{size} ({of}, {p}): {self._beyond_margin()}."
        if self.kind == "small difference":
            better = "better" if lower else "worse"
            return (
                f"{self.arm} is {better} than {self.reference} by {abs(mean):.4f} {unit}, less than the margin of "
                f"{margin:g} that the study called too small to matter ({of}, {p})."
            )
        if self.kind == "equivalence":
            return (
                f"{self.arm} and {self.reference} are equivalent: they differ by less than the margin of {margin:g} "
                f"{unit} ({of}, p of an equivalence {self._adjusted(self.p_equivalence)}); no "
                f"difference was shown ({p}){self._alone()}."
            )
        return (
            f"{self.arm} and {self.reference}: undecided, neither a difference nor an equivalence within {margin:g} "
            f"{unit} was shown ({of}, {p}, p of an equivalence {_p(self.p_equivalence)})"
            f"{self._alone()}; {self.needed()}."
        )

    def p_words(self) -> str:
        """p, and what it is adjusted for."""
        return f"p {self._adjusted(self.p)}"

    def _adjusted(self, p: float) -> str:
        return f"{_p(p)}{f' after Holm over {self.comparisons}' if self.comparisons > 1 else ''}"

    def _beyond_margin(self) -> str:
        """How a difference's interval lies to the margin."""
        _, low, high = (float(value) for value in self.interval)
        least, margin = min(abs(low), abs(high)), self.axis.margin
        if least > margin:
            return f"more than the margin of {margin:g} by all of the interval"
        return f"as little as {least:.4f}, within the margin of {margin:g}, is not excluded"

    def _alone(self) -> str:
        """Where an interval, which is of this comparison alone, seems to contradict the verdict."""
        _, low, high = self.interval
        said, alpha = "", 1 - self.level
        if not low <= 0 <= high:
            said = (
                f"; the interval alone leaves out 0, but one of {self.comparisons} comparisons does so by chance too "
                "often"
            )
        if (p := self.alone[1]) <= alpha < self.p_equivalence:
            said += f"; looked at alone it is within the margin (p {_p(p)}), but not after Holm over {self.comparisons}"
        return said

    def needed(self, names: tuple[str, str] = ("a difference", "an equivalence")) -> str:
        """What an undecided comparison lacks, and which of the two more seeds would show. names: of these."""
        if self.more_seeds is None:
            return f"even {MOST_SEEDS} seeds would not decide it, if the difference is what was seen"
        seeds = f"{self.more_seeds} more seed{'s' * (self.more_seeds != 1)}"
        mean, deviation = float(np.mean(self.differences)), float(np.std(self.differences, ddof=1))
        alpha = (1 - self.level) / self.comparisons
        n = len(self.seeds) + self.more_seeds
        difference, equivalence = _powers(mean, deviation, self.axis.margin, n, alpha)
        holm = f" after Holm over {self.comparisons}" * (self.comparisons > 1)
        return (
            f"about {seeds} needed to show {names[equivalence > difference]}{holm} in {POWER:.0%} of such studies, if "
            "spread and difference are what was seen"
        )


def _kind(p: float, p_equivalence: float, alpha: float) -> Kind:
    if p <= alpha:
        return "small difference" if p_equivalence <= alpha else "difference"
    return "equivalence" if p_equivalence <= alpha else "undecided"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def compare_all(
    scores: Mapping[str, Mapping[int, float]], reference: str, axis: Axis, *, level: float = LEVEL
) -> list[Comparison]:
    """Every other arm against `reference`, paired by seed. scores: arm → seed → score; failed runs are left out.

    Holm's adjustment counts every arm of `scores`, also one without a seed in common with the reference.
    """
    require(reference in scores, "reference", reference, f"must be one of the arms: {', '.join(scores)}")
    return compare_pairs([(arm, reference) for arm in scores if arm != reference], scores, axis, level=level)


def compare_pairs(
    pairs: Sequence[tuple[str, str]],
    scores: Mapping[str, Mapping[int, float]],
    axis: Axis,
    *,
    level: float = LEVEL,
) -> list[Comparison]:
    """Each of these (arm, reference) by their `scores`, as `compare_all`; p is adjusted by Holm over all of them."""
    differences = [_paired(scores[arm], scores[reference]) for arm, reference in pairs]
    tests = [_tests(list(values.values()), axis.margin) for values in differences]
    p, p_equivalence = (holm([test[side] for test in tests]) if tests else [] for side in (0, 1))
    found = []
    for index, (arm, reference) in enumerate(pairs):
        values = list(differences[index].values())
        undecided = _kind(float(p[index]), float(p_equivalence[index]), 1 - level) == "undecided"
        interval = t_interval(values, level) if values else Interval(math.nan, -math.inf, math.inf)
        found.append(
            Comparison(
                arm=arm,
                reference=reference,
                axis=axis,
                seeds=tuple(differences[index]),
                differences=tuple(values),
                interval=Interval(*(float(bound) for bound in interval)),
                p=float(p[index]),
                p_equivalence=float(p_equivalence[index]),
                more_seeds=_more_seeds(values, axis.margin, (1 - level) / len(pairs)) if undecided else None,
                comparisons=len(pairs),
                level=level,
                correlation=_correlation(scores[arm], scores[reference]),
            )
        )
    return found


def _paired(one: Mapping[int, float], other: Mapping[int, float]) -> dict[int, float]:
    """Seed → difference, of the seeds that both have."""
    return {seed: one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())}


def _correlation(one: Mapping[int, float], other: Mapping[int, float]) -> float | None:
    """Pearson's, of the seeds that both have; None for fewer than three, or scores that are all equal."""
    both = sorted(one.keys() & other.keys())
    rows = [[each[seed] for seed in both] for each in (one, other)]
    if len(both) < 3 or any(min(row) == max(row) for row in rows):
        return None
    matrix: Any = np.corrcoef(rows)
    return float(matrix[0, 1])


def _tests(values: Sequence[float], margin: float) -> tuple[float, float]:
    return (float(difference_test(values)), float(equivalence_test(values, margin))) if values else (1.0, 1.0)


def _more_seeds(values: Sequence[float], margin: float, alpha: float) -> int | None:
    """Seeds beyond those there are, at the α of the strictest of Holm's comparisons; at least one."""
    if len(values) < 2:
        return 2 - len(values)
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    needed = seeds_to_decide(mean, deviation, margin, alpha=alpha)
    return None if needed is None else max(1, needed - len(values))
