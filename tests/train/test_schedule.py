"""The learning rate over a run."""

import math

import pytest

from swamla.train.schedule import WARMUP_FLOOR, Budget, Schedule


def schedule(name="cosine", *, warmup=0.0, decay=0.2, floor=0.1):
    return Schedule(name=name, warmup=warmup, decay=decay, floor=floor)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("cosine", {0.0: 1.0, 0.5: 0.55, 1.0: 0.1}),
        ("linear", {0.0: 1.0, 0.5: 0.55, 0.75: 0.325, 1.0: 0.1}),
        ("wsd", {0.0: 1.0, 0.5: 1.0, 0.8: 1.0, 0.9: 0.55, 1.0: 0.1}),
        ("constant", {0.0: 1.0, 0.5: 1.0, 1.0: 1.0}),
    ],
)
def test_each_shape_has_the_values_of_its_formula(name, values):
    found = {p: schedule(name).factor(p, step=10) for p in values}
    assert found == pytest.approx(values)


def test_warm_up_by_fraction_rises_with_progress_and_the_shape_begins_after_it():
    s = schedule(warmup=0.2)
    assert s.factor(0.1, step=0) == pytest.approx(0.5)
    assert s.factor(0.2, step=0) == 1.0
    assert s.factor(0.6, step=0) == pytest.approx(0.55)


def factors(s, steps):
    """The factor of every step of a run of `steps`."""
    return [s.factor((i + 0.5) / steps, step=i) for i in range(steps)]


def nanogpt(step, steps, warmup, floor):
    """nanoGPT's get_lr over the learning rate."""
    along = (step - warmup) / (steps - warmup)
    return floor + 0.5 * (1 + math.cos(math.pi * along)) * (1 - floor)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("steps", [200, 2000])
def test_the_peak_is_reached_when_a_warm_up_by_steps_ends_and_not_before(name, steps):
    found = factors(schedule(name, warmup=100), steps)
    assert found[99] == 1.0
    assert max(found[:99]) < 1.0
    assert found[:99] == pytest.approx([(i + 1) / 100 for i in range(99)])
    assert found[100:] == sorted(found[100:], reverse=True)
    assert found[-1] == pytest.approx(1.0 if name == "constant" else 0.1, abs=0.03)


def test_after_its_warm_up_cosine_is_nanogpts():
    found = factors(schedule(warmup=100), 2000)
    assert found[100:] == pytest.approx([nanogpt(i, 2000, 100, 0.1) for i in range(100, 2000)], abs=1e-3)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_warm_up_by_steps_is_warm_up_by_the_fraction_that_they_are(name):
    by_steps, by_fraction = factors(schedule(name, warmup=50), 500), factors(schedule(name, warmup=0.1), 500)
    assert by_steps[50:] == pytest.approx(by_fraction[50:])


def test_bounded_by_time_the_shape_begins_after_a_warm_up_by_steps_at_the_pace_so_far():
    s = schedule("linear", warmup=10, floor=0.0)
    assert s.factor(0.095, step=9) == 1.0  # a step takes a hundredth of the run
    assert s.factor(0.5, step=49) == pytest.approx(1 - (0.5 - 10 / 99) / (1 - 10 / 99))
    assert s.factor(1.0, step=99) == 0.0


def test_a_run_that_is_all_warm_up_ends_at_the_peak():
    assert factors(schedule(warmup=8), 8)[-1] == 1.0


def test_warm_up_by_steps_counts_steps():
    s = schedule("constant", warmup=4)
    assert [s.factor(0.5, step=i) for i in range(6)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_the_first_step_of_a_warm_up_already_learns():
    assert schedule(warmup=0.5).factor(0.0, step=0) == WARMUP_FLOOR


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_a_run_that_overruns_stays_at_the_floor(name):
    assert schedule(name).factor(1.3, step=9) == pytest.approx(0.1)


def test_progress_is_the_further_of_steps_and_time():
    budget = Budget(steps=100, seconds=60)
    assert budget.progress(50, 6) == 0.5
    assert budget.progress(50, 45) == 0.75
    assert Budget(steps=100, seconds=None).progress(50, 1e9) == 0.5
    assert Budget(steps=None, seconds=60).progress(10**9, 30) == 0.5
