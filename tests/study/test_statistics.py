"""Intervals, tests and verdicts of studies, held to simulated studies whose differences are known, and to scipy."""

import builtins
import math

import numpy as np
import pytest
from scipy import stats

from swamla.errors import ConfigError, MissingBackendError
from swamla.study.statistics import (
    Axis,
    compare_all,
    difference_test,
    equivalence_test,
    holm,
    seeds_to_decide,
    t_interval,
    wilson,
)

STUDIES, SEEDS, ARMS = 2000, 5, 3
MARGIN = 0.01


def simulated(difference, deviation=0.01, *, studies=STUDIES, seeds=SEEDS, arms=ARMS, seed=0):
    """Paired differences of simulated studies, (studies, arms, seeds)."""
    return np.random.default_rng(seed).normal(difference, deviation, (studies, arms, seeds))


@pytest.mark.parametrize("difference", [0.0, 0.02])
@pytest.mark.parametrize("seeds", [2, 5, 12])
def test_the_interval_contains_the_true_difference_in_95_of_100_studies(difference, seeds):
    _, low, high = t_interval(simulated(difference, seeds=seeds))
    assert ((low <= difference) & (difference <= high)).mean() == pytest.approx(0.95, abs=0.01)


def test_pairing_by_seed_takes_out_what_a_seed_does_to_both_arms():
    generator = np.random.default_rng(1)
    of_seed = generator.normal(0, 1.0, (STUDIES, 1, SEEDS))
    noise = generator.normal(0, 0.01, (STUDIES, 2, SEEDS))
    scores = of_seed + noise + np.array([0.0, 0.05])[:, None]
    assert (difference_test(scores[:, 1] - scores[:, 0]) < 0.05).mean() > 0.99


def test_under_holm_a_study_without_differences_claims_one_in_at_most_5_of_100_cases():
    claimed = (holm(difference_test(simulated(0.0))) <= 0.05).any(-1).mean()
    unadjusted = (difference_test(simulated(0.0)) <= 0.05).any(-1).mean()
    assert claimed <= 0.055  # 5 %, and one standard error of 2,000 studies
    assert unadjusted > 0.12, "or the adjustment shows nothing"


def test_under_holm_a_true_difference_does_not_let_false_ones_through():
    p = holm(difference_test(simulated(np.array([0.1, 0.0, 0.0])[:, None])))
    assert (p[:, 0] <= 0.05).mean() > 0.99
    assert (p[:, 1:] <= 0.05).any(-1).mean() <= 0.055


def test_arms_that_differ_by_the_margin_are_called_equivalent_in_at_most_5_of_100_studies():
    assert (holm(equivalence_test(simulated(MARGIN), MARGIN)) <= 0.05).any(-1).mean() <= 0.055
    assert (equivalence_test(simulated(-MARGIN, arms=1), MARGIN) <= 0.05).mean() == pytest.approx(0.05, abs=0.01)


def test_equal_arms_with_a_small_spread_are_called_equivalent():
    assert (holm(equivalence_test(simulated(0.0, 0.002), MARGIN)) <= 0.05).all(-1).mean() > 0.95


def test_tests_and_intervals_are_those_of_scipy():
    values = simulated(0.01, studies=20)
    expected = stats.ttest_1samp(values, 0.0, axis=-1)
    np.testing.assert_allclose(difference_test(values), expected.pvalue, rtol=1e-10)
    interval = expected.confidence_interval(0.95)
    np.testing.assert_allclose(t_interval(values)[1:], [interval.low, interval.high], rtol=1e-10)
    below = stats.ttest_1samp(values, MARGIN, axis=-1, alternative="less").pvalue
    above = stats.ttest_1samp(values, -MARGIN, axis=-1, alternative="greater").pvalue
    np.testing.assert_allclose(equivalence_test(values, MARGIN), np.maximum(below, above), rtol=1e-10)


def test_an_equivalence_is_an_interval_of_90_of_100_within_the_margin():
    values = simulated(0.003, 0.005)
    _, low, high = t_interval(values, 0.9)
    inside = np.maximum(-low, high) < MARGIN
    np.testing.assert_array_equal(equivalence_test(values, MARGIN) < 0.05, inside)


def stepwise_holm(p, alpha):
    """Which p-values Holm rejects, as his paper says it: the smallest against α / m, the next against α / (m − 1) …"""
    rejected = set()
    for step, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        if p[index] > alpha / (len(p) - step):
            break
        rejected.add(index)
    return rejected


def test_adjusted_values_reject_what_holm_rejects_step_by_step():
    for p in np.random.default_rng(2).uniform(0, 0.1, (200, 4)) ** 1.5:
        assert {i for i, value in enumerate(holm(p)) if value <= 0.05} == stepwise_holm(p, 0.05)


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (3, 5), (5, 5), (17, 40)])
def test_wilson_is_scipys(successes, trials):
    expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert wilson(successes, trials) == pytest.approx((successes / trials, expected.low, expected.high), abs=1e-12)


def test_a_rate_without_trials_may_be_anything():
    rate, low, high = wilson(0, 0)
    assert (math.isnan(rate), low, high) == (True, 0.0, 1.0)
    with pytest.raises(ConfigError, match=r"successes = 3.*0 … trials = 2"):
        wilson(3, 2)


@pytest.mark.parametrize(("difference", "deviation"), [(0.012, 0.01), (0.03, 0.02), (0.05, 0.011)])
def test_with_the_seeds_that_are_said_to_be_needed_four_of_five_studies_find_the_difference(difference, deviation):
    needed = seeds_to_decide(difference, deviation, 0.001)
    assert needed is not None
    power = [
        (difference_test(simulated(difference, deviation, arms=1, seeds=n, studies=4000)) <= 0.05).mean()
        for n in (needed - 1, needed)
    ]
    assert power[1] >= 0.78
    assert power[0] < 0.82, "fewer seeds would have done"


@pytest.mark.parametrize(("difference", "deviation"), [(0.0, 0.01), (0.004, 0.01)])
def test_with_the_seeds_that_are_said_to_be_needed_four_of_five_studies_find_the_equivalence(difference, deviation):
    needed = seeds_to_decide(difference, deviation, 0.01)
    assert needed is not None
    power = [
        (equivalence_test(simulated(difference, deviation, arms=1, seeds=n, studies=4000), 0.01) <= 0.05).mean()
        for n in (needed - 1, needed)
    ]
    assert power[1] >= 0.78
    assert power[0] < 0.82, "fewer seeds would have done"


def test_a_difference_at_the_margin_with_a_large_spread_needs_more_seeds_than_are_proposed():
    assert seeds_to_decide(0.01, 1.0, 0.01) is None


def scores(*differences, spread=0.001):
    """A reference, and an arm for each difference, with a small known spread over five seeds."""
    seeds = range(1, 6)
    reference = {seed: 1.3 + 0.05 * math.sin(7 * seed) for seed in seeds}
    arms = {
        name: {seed: reference[seed] + difference + spread * (-2, 1, 0, 2, -1)[seed - 1] for seed in seeds}
        for name, difference in zip(("swa", "gdn", "mla"), differences, strict=False)
    }
    return {"mha": reference, **arms}


def test_a_difference_is_said_with_its_direction_interval_seeds_and_p():
    worse, better = compare_all(scores(0.05, -0.05), "mha", Axis(margin=0.01))
    assert worse.kind == better.kind == "difference"
    assert worse.words().startswith(
        "swa is worse than mha by 0.0500 bits per byte (95% interval of the difference +0.0"
    )
    assert better.words().startswith("gdn is better than mha by 0.0500 bits per byte")
    assert "5 seeds, p < 0.001 after Holm over 2" in worse.words()


def test_a_difference_says_whether_all_of_its_interval_is_beyond_the_margin():
    (beyond,) = compare_all(scores(0.05), "mha", Axis(margin=0.01))
    assert beyond.words().endswith("): more than the margin of 0.01 by all of the interval.")
    (across,) = compare_all(scores(0.011), "mha", Axis(margin=0.01))
    assert across.kind == "difference"
    least = float(across.interval.low)
    assert 0 < least < 0.01
    assert across.words().endswith(f"): as little as {least:.4f}, within the margin of 0.01, is not excluded.")


def test_where_holm_alone_keeps_an_equivalence_from_being_said_both_ps_are():
    one, other = 0.002, 0.02
    found = compare_all(scores(one, other, other, spread=0.0043), "mha", Axis(margin=0.01))[0]
    alone = float(equivalence_test(list(found.differences), 0.01))
    assert alone <= 0.05 < found.p_equivalence
    assert found.kind == "undecided"
    assert f"p of an equivalence = {found.p_equivalence:.3f})" in found.words()
    assert f"alone it is within the margin (p = {alone:.3f}), but not after Holm over 3;" in found.words()
    assert "needed to show an equivalence after Holm over 3 in 80% of such studies" in found.words()


def test_more_seeds_are_said_to_show_a_difference_where_that_is_likelier():
    (found,) = compare_all(scores(0.01, spread=0.006), "mha", Axis(margin=0.001))
    assert found.kind == "undecided"
    assert "needed to show a difference in 80% of such studies" in found.words()


def test_the_correlation_of_both_arms_over_seeds_is_numpys_and_unknown_of_two_seeds():
    found = scores(0.05, spread=0.04)
    (comparison,) = compare_all(found, "mha", Axis())
    rows = [list(found[arm].values()) for arm in ("mha", "swa")]
    assert comparison.correlation == pytest.approx(np.corrcoef(rows)[0, 1])
    assert abs(comparison.correlation) < 0.9
    few = {arm: {seed: row[seed] for seed in (1, 2)} for arm, row in found.items()}
    assert compare_all(few, "mha", Axis())[0].correlation is None


def test_where_higher_is_better_the_words_turn():
    accuracy = Axis(name="accuracy", direction="higher", margin=0.01)
    assert "swa is better than mha by 0.0500 accuracy" in compare_all(scores(0.05), "mha", accuracy)[0].words()


def test_an_equivalence_is_said_as_one_and_claims_no_difference():
    (found,) = compare_all(scores(0.0005), "mha", Axis(margin=0.01))
    assert found.kind == "equivalence"
    assert "are equivalent: they differ by less than the margin of 0.01" in found.words()
    assert "5 seeds, p of an equivalence < 0.001); no difference was shown" in found.words()


def test_a_difference_within_the_margin_is_called_too_small_to_matter():
    (found,) = compare_all(scores(0.005), "mha", Axis(margin=0.01))
    assert found.kind == "small difference"
    assert "less than the margin of 0.01 that the study called too small to matter" in found.words()


def test_undecided_is_said_with_the_seeds_that_are_missing_and_no_ranking():
    (found,) = compare_all(scores(0.006, spread=0.008), "mha", Axis(margin=0.01))
    assert found.kind == "undecided"
    assert found.more_seeds is not None
    assert f"about {found.more_seeds} more seeds needed" in found.words()
    assert not any(word in found.words() for word in ("better", "worse", "best"))


def test_the_interval_and_holm_are_reconciled_in_words():
    (one,) = compare_all(scores(0.0021), "mha", Axis(margin=0.0005))
    several = compare_all(scores(0.0021, 0.0, 0.0), "mha", Axis(margin=0.0005))
    assert one.kind == "difference"
    assert several[0].interval == one.interval
    assert several[0].kind == "undecided"
    assert "leaves out 0, but one of 3 comparisons does so by chance too often" in several[0].words()


def test_one_seed_decides_nothing_and_none_says_so():
    few = {arm: {1: found[1]} for arm, found in scores(0.5).items()}
    (one,) = compare_all(few, "mha", Axis())
    assert one.kind == "undecided"
    assert "differ by +0.49" in one.words()
    assert "at least 1 more seed needed" in one.words()
    (none,) = compare_all({"mha": {1: 1.0}, "swa": {}}, "mha", Axis())
    assert "have no seed in common" in none.words()


def test_arms_that_are_equal_to_the_digit_are_equivalent():
    same = scores(0.0, spread=0.0)
    (found,) = compare_all({"mha": same["mha"], "swa": same["mha"]}, "mha", Axis())
    assert (found.kind, found.p, found.p_equivalence) == ("equivalence", 1.0, 0.0)


def test_only_seeds_that_ended_in_both_arms_are_paired():
    found = scores(0.05)
    del found["swa"][3]
    (comparison,) = compare_all(found, "mha", Axis())
    assert comparison.seeds == (1, 2, 4, 5)


def test_without_scipy_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def missing(name, *more, **named):
        if name.startswith("scipy"):
            raise ImportError("no module named scipy")
        return real(name, *more, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingBackendError, match=r"need scipy: pip install 'swamla\[lab\]'"):
        t_interval([1.0, 2.0])
