"""The learning rate over a run."""

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
    assert s.factor(0.2, step=0) == pytest.approx(1.0)
    assert s.factor(0.6, step=0) == pytest.approx(0.55)


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
