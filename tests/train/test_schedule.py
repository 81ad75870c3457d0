"""The learning rate over a run."""

import math

import pytest
import torch

from swamla.errors import Interrupted
from swamla.train.schedule import WARMUP_FLOOR, Budget, Schedule
from swamla.train.tracking.metrics import read_metrics

from .helpers import run, tiny_config
from .test_resume import stop_after


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    """Most of a tiny run's time."""
    monkeypatch.setattr("swamla.train.loop.plot_losses", lambda *args, **options: None)


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
    found = {p: schedule(name).factor(p, step=10**9) for p in values}  # of so many that one is nothing
    assert found == pytest.approx(values)


def test_warm_up_by_fraction_rises_with_progress_and_the_shape_begins_after_it():
    s = schedule(warmup=0.2)
    assert s.factor(0.1, step=0) == pytest.approx(0.5)
    assert s.factor(0.2, step=0) == 1.0
    assert s.factor(0.6, step=2) == pytest.approx(0.55)


def factors(s, steps):
    """The factor of every step of a run of `steps`."""
    return [s.factor((i + 1) / steps, step=i) for i in range(steps)]


def by_hand(name, n, steps, warmup, decay, floor):
    """The factor of the n-th step, from 1, after `warmup` steps, a whole number above 0, of warm-up."""
    if n < warmup:
        return n / warmup
    left, all_left = steps - n, steps - warmup
    if name == "linear":
        return floor + (1 - floor) * left / all_left
    if name == "cosine":
        return floor + (1 - floor) * math.cos(math.pi / 2 * (1 - left / all_left)) ** 2
    if name == "wsd":
        return 1.0 if left >= decay * steps else floor + (1 - floor) * left / (decay * steps)
    return 1.0


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("by", ["steps", "fraction"])
@pytest.mark.parametrize(("steps", "warmup"), [(10, 2), (40, 8), (500, 50), (1000, 1), (64, 32)])
def test_every_step_has_the_factor_of_its_end(name, by, steps, warmup):
    if by == "fraction" and warmup == 1:
        return  # a fraction of 1 step is below what a step is; the next test
    s = schedule(name, warmup=warmup if by == "steps" else warmup / steps)
    found = factors(s, steps)
    expected = [by_hand(name, n, steps, warmup, 0.2, 0.1) for n in range(1, steps + 1)]
    assert found == pytest.approx(expected, rel=1e-12)
    assert found[warmup - 1] == pytest.approx(1.0, abs=1e-15)
    assert max(found[: warmup - 1], default=0.0) < 1.0
    assert found[-1] == (1.0 if name == "constant" else pytest.approx(0.1, abs=1e-15))
    assert found[-1] < found[-2] or name == "constant"


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup", [0.0, 1e-9, 1.0])
def test_with_no_more_than_a_step_of_warm_up_the_first_step_has_the_peak_and_the_last_the_floor(name, warmup):
    found = factors(schedule(name, warmup=warmup, floor=0.0), 50)
    assert found[0] == 1.0
    assert found[-1] == pytest.approx(0.0, abs=1e-15)
    assert found == pytest.approx([by_hand(name, n, 50, 1, 0.2, 0.0) for n in range(1, 51)], abs=1e-12)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_the_shapes_are_those_of_transformers_at_each_steps_end(name):
    from torch.optim import SGD
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup, get_wsd_schedule

    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = {
        "cosine": lambda: get_cosine_schedule_with_warmup(optimizer, 25, 200),
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, 25, 200),
        "wsd": lambda: get_wsd_schedule(
            optimizer, 25, 40, num_training_steps=200, decay_type="linear", min_lr_ratio=0.0
        ),
    }[name]()
    (factor,) = theirs.lr_lambdas
    found = factors(schedule(name, warmup=25, floor=0.0), 200)
    assert found == pytest.approx([factor(n) for n in range(1, 201)], abs=1e-12)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup", [0.25, 5.0])
def test_a_run_trains_with_exactly_these_rates_however_often_it_is_resumed(name, warmup, tmp_path, dataset):
    rates = {"schedule": name, "warmup": warmup, "lr": 0.02, "min_lr_ratio": 0.05, "decay": 0.5, "save_interval": 1}
    config = tiny_config(steps=20, batch_size=1, block_size=16, **rates)
    run(config, tmp_path / "whole", dataset)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Interrupted):
            run(config, tmp_path / "parts", dataset)
    run(config, tmp_path / "parts", dataset, resume=True)
    found, resumed = (
        [r["lr"] for r in read_metrics(tmp_path / folder / "metrics.jsonl") if "lr" in r]
        for folder in ("whole", "parts")
    )
    assert found == pytest.approx([0.02 * by_hand(name, n, 20, 5, 0.5, 0.05) for n in range(1, 21)], rel=1e-12)
    assert found[4] == 0.02
    assert found[-1] == pytest.approx(0.001, rel=1e-12)
    assert resumed == found


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("steps", [200, 2000])
def test_the_peak_is_reached_when_a_warm_up_by_steps_ends_and_not_before(name, steps):
    found = factors(schedule(name, warmup=100), steps)
    assert found[99] == 1.0
    assert max(found[:99]) < 1.0
    assert found[:99] == pytest.approx([(i + 1) / 100 for i in range(99)])
    assert found[100:] == sorted(found[100:], reverse=True)
    assert found[-1] == pytest.approx(1.0 if name == "constant" else 0.1, abs=1e-15)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_warm_up_by_steps_is_warm_up_by_the_fraction_that_they_are(name):
    by_steps, by_fraction = factors(schedule(name, warmup=50), 500), factors(schedule(name, warmup=0.1), 500)
    assert by_steps[50:] == pytest.approx(by_fraction[50:])


def test_bounded_by_time_the_shape_begins_after_a_warm_up_by_steps_at_the_pace_so_far():
    s = schedule("linear", warmup=10, floor=0.0)
    assert s.factor(0.1, step=9) == 1.0  # a step takes a hundredth of the run
    assert s.factor(0.5, step=49) == pytest.approx(1 - 40 / 90)
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
