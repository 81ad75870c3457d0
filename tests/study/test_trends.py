"""What becomes of a difference with size: its words, and simulated studies whose change is known."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from swamla.study.statistics import Axis, Direction, compare_pairs, difference_test, holm, t_interval
from swamla.study.trends import Trend, trends_of

STUDIES, SEEDS = 2000, 5
SPREAD = (0.001, -0.002, 0.0, 0.002, -0.001)


def simulated(*, correlation: float = 0.0, arms: int = 1) -> np.ndarray:
    """Differences of studies at two sizes whose means are 0.03 and 0.01, (studies, arms, sizes, seeds)."""
    covariance = 1e-4 * np.array([[1.0, correlation], [correlation, 1.0]])
    drawn = np.random.default_rng(3).multivariate_normal((0.03, 0.01), covariance, (STUDIES, arms, SEEDS))
    return drawn.swapaxes(-1, -2)


def trends(
    *arms: tuple[Sequence[float], Sequence[float]], margin: float = 0.01, direction: Direction = "lower"
) -> list[Trend]:
    """Of arms with these differences, of seeds 1, 2, 3 …, at widths 64 and 128 from a reference that scores 1."""
    axis = Axis(margin=margin, direction=direction)
    scores: dict[str, dict[int, float]] = {}
    pairs = []
    for number, size in enumerate((64, 128)):
        scores[f"mha@{size}"] = dict.fromkeys(range(1, 9), 1.0)
        for index, arm in enumerate(arms):
            scores[f"{index}@{size}"] = dict(enumerate((1.0 + each for each in arm[number]), 1))
            pairs.append((f"{index}@{size}", f"mha@{size}"))
    found = [replace(one, arm=one.arm[0], reference="mha") for one in compare_pairs(pairs, scores, axis)]
    return trends_of({64: found[: len(arms)], 128: found[len(arms) :]}, axis)


def about(mean: float, spread: float = 1.0, *, turned: bool = False) -> list[float]:
    return [mean + spread * each for each in (reversed(SPREAD) if turned else SPREAD)]


@pytest.mark.parametrize("correlation", [-0.8, 0.0, 0.8])
def test_the_interval_of_the_change_contains_it_in_95_of_100_studies_however_sizes_are_correlated(correlation: float):
    change = np.diff(simulated(correlation=correlation), axis=-2)[:, 0, 0]
    _, low, high = t_interval(change)
    assert ((low <= -0.02) & (high >= -0.02)).mean() == pytest.approx(0.95, abs=0.01)


def test_an_interval_for_independent_sizes_would_promise_too_much_where_they_are_correlated_negatively():
    first, last = np.moveaxis(simulated(correlation=-0.8)[:, 0], 1, 0)
    interval = stats.ttest_ind(last, first, axis=-1, equal_var=False).confidence_interval(0.95)
    assert ((interval.low <= -0.02) & (interval.high >= -0.02)).mean() < 0.92


def test_studies_whose_differences_stay_claim_a_change_anywhere_in_at_most_5_of_100_cases():
    change = np.diff(simulated(correlation=-0.5, arms=3), axis=-2)[:, :, 0] + 0.02
    assert (holm(difference_test(change)) <= 0.05).any(-1).mean() <= 0.055


def test_the_change_of_a_trend_is_paired_by_seed_and_adjusted_for_all_arms():
    study = simulated(arms=3)[0]
    found = trends(*((list(first), list(last)) for first, last in study))
    change = np.diff(study, axis=-2)[:, 0]
    np.testing.assert_allclose([one.change.p for one in found], holm(difference_test(change)), rtol=1e-9)
    np.testing.assert_allclose([one.change.interval for one in found], np.stack(t_interval(change), -1), rtol=1e-9)
    assert {one.change.comparisons for one in found} == {3}
    assert {one.first.comparisons for one in found} == {6}, "differences are adjusted for arms and sizes"


@pytest.mark.parametrize(
    ("first", "last", "kind"),
    [
        (about(0.05), about(0.02, turned=True), "fades"),
        (about(-0.05), about(-0.02, turned=True), "fades"),
        (about(0.05), about(0.0, turned=True), "fades"),
        (about(0.02), about(0.05, turned=True), "grows"),
        (about(0.05), about(-0.03, turned=True), "turns"),
        (about(0.0, 3.0), about(0.05), "changes"),
        (about(0.05), about(0.051, turned=True), "stays"),
        (about(0.05), about(0.055, turned=True), "stays"),  # a change that is shown, but less than the margin
        (about(0.05), about(0.045, 9.0, turned=True), "undecided"),
        (about(0.05), [0.04], "undecided"),
        (about(0.05), [], "undecided"),
    ],
)
def test_the_trend_in_a_word(first: list[float], last: list[float], kind: str):
    (found,) = trends((first, last))
    assert found.kind == kind
    assert kind in found.words()


def test_the_sentence_has_both_ends_the_interval_and_the_seeds_and_whom_it_favours():
    (found,) = trends((about(0.05), about(-0.03, turned=True)))
    assert found.words().startswith(
        "From width 64 to 128, the difference of 0 from mha turns: 0 is better at the larger size only: it went from "
        "+0.0500 to -0.0300 bits per byte (95% interval of the change -0.08"
    )
    assert "5 seeds, p < 0.001)" in found.words()
    (accurate,) = trends((about(0.05), about(-0.03, turned=True)), direction="higher")
    assert "0 is worse at the larger size only" in accurate.words()
    (appears,) = trends((about(0.0, 3.0), about(0.05)))
    assert "not shown at the smaller size, changes in favour of mha" in appears.words()


def test_undecided_says_how_many_more_seeds_are_needed_and_claims_nothing():
    (found,) = trends((about(0.05), about(0.045, 9.0, turned=True)))
    assert "whether the difference of 0 from mha fades, stays or turns is undecided" in found.words()
    assert f"about {found.change.more_seeds} more seeds needed" in found.words()
    (single,) = trends((about(0.05), [0.04]))
    assert single.words().endswith("undecided. It is known at 1 seed of both sizes, of 2 at least.")


def test_with_fewer_seeds_at_the_larger_size_the_sentence_is_of_those_that_both_have():
    (found,) = trends(([0.050, 0.051, 0.049, 0.080, 0.090], [0.020, 0.021, 0.020]))
    assert found.change.seeds == (1, 2, 3)
    assert "it went from +0.0500 to +0.0203 bits per byte" in found.words()
    assert "3 seeds" in found.words()
