"""Which runs a study needs follows from the outcomes so far; its rates are searched for as it says."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from swamla.study.runs import (
    FARTHEST,
    GRID,
    Outcome,
    Run,
    chosen_rate,
    command,
    describe,
    next_rates,
    predict,
    ready,
    runs_left,
)

from .helpers import arm_of, study_of


def searched(score) -> dict[int, float]:
    """The scores of all rates that the search tries on a curve."""
    scores: dict[int, float] = {}
    while rates := next_rates(scores):
        assert not set(rates) & scores.keys()
        scores |= {rate: score(rate) for rate in rates}
    return scores


def test_the_grid_has_three_rates_the_root_of_ten_apart_about_the_arms_own():
    assert next_rates({}) == GRID
    assert [arm_of("mha").lr(rate) for rate in GRID] == [0.00316, 0.01, 0.0316]


@pytest.mark.parametrize("bottom", range(-9, 10))
def test_the_search_is_extended_while_the_best_is_at_an_edge_and_ends_beside_the_lowest_point(bottom):
    scores = searched(lambda rate: (rate - bottom + 0.1) ** 2)
    assert chosen_rate(scores) == bottom
    assert {bottom - 1, bottom + 1} & scores.keys()
    coarse = sorted(rate for rate in scores if rate % 2 == 0)
    best = min(coarse, key=lambda rate: scores[rate])
    assert coarse[0] < best < coarse[-1] or abs(best) == FARTHEST
    assert {best - 1, best + 1} <= scores.keys()
    assert coarse == list(range(coarse[0], coarse[-1] + 1, 2))


def test_a_search_whose_best_is_inside_takes_five_runs():
    assert len(searched(lambda rate: rate**2)) == 5


def test_where_high_rates_diverge_lower_ones_are_tried():
    scores = searched(lambda rate: math.inf if rate > -4 else 1.0 - 0.1 * rate)
    assert chosen_rate(scores) == -4
    assert searched(lambda rate: math.inf).keys() == {*range(2, -FARTHEST - 1, -2)}
    assert chosen_rate({0: math.inf}) is None


def outcome(run: Run, validation: float | None = 1.0, wall: float = 10.0) -> Outcome:
    status = "diverged" if validation is None else "finished"
    kept = {name: getattr(run, name) for name in ("arm", "purpose", "rate", "lr", "seed")}
    return Outcome(run=run.id, status=status, validation=validation, wall=wall, **kept)


def played(study, score) -> list[Run]:
    """All runs of a study in the order in which one job at a time would do them."""
    outcomes, order = {}, []
    while runs := ready(study, outcomes):
        order.append(runs[0])
        outcomes[runs[0].id] = outcome(runs[0], score(runs[0]))
    return order


def test_an_arm_that_is_dear_may_have_fewer_seeds_than_its_study_and_never_more():
    study = study_of("mha", "gdn", seeds=3, rates="recipe")
    first, second = study.arms
    fewer = replace(study, arms=(replace(first, seeds=1), replace(second, seeds=9)))
    assert [(run.arm, run.seed) for run in played(fewer, lambda run: 1.0)] == [
        ("mha", 1),
        ("gdn", 1),
        ("gdn", 2),
        ("gdn", 3),
    ]
    assert predict(fewer, {}, jobs=1).runs == 4


def test_arms_take_turns_and_seeds_are_fresh_and_the_same_in_every_arm_at_the_arms_best_rate():
    study = study_of(seeds=3)
    order = played(study, lambda run: abs(run.rate - {"mha": 0.9, "gdn": -0.9}[run.arm]))
    assert [run.arm for run in order] == ["mha", "gdn"] * 8
    assert [run.seed for run in order if run.purpose == "rate"] == [0] * 10
    for arm, rate in (("mha", 1), ("gdn", -1)):
        seeds = [run for run in order if run.arm == arm and run.purpose == "seed"]
        assert [(run.seed, run.rate) for run in seeds] == [(1, rate), (2, rate), (3, rate)]
        assert {run.lr for run in seeds} == {study.arm(arm).lr(rate)}


def test_an_arm_that_no_rate_trains_gets_no_seeds_and_the_others_do():
    order = played(study_of(), lambda run: None if run.arm == "gdn" else abs(run.rate))
    assert {run.arm for run in order if run.purpose == "seed"} == {"mha"}


def test_without_a_search_every_arm_trains_its_seeds_at_the_recipes_rate():
    order = played(study_of(rates="recipe"), lambda run: 1.0)
    assert [(run.arm, run.seed, run.lr) for run in order] == [
        ("mha", 1, 0.01), ("gdn", 1, 0.01), ("mha", 2, 0.01), ("gdn", 2, 0.01),
    ]  # fmt: skip


def test_the_predicted_number_of_runs_is_the_played_one_where_no_best_is_at_an_edge():
    study = study_of(seeds=4)
    order, outcomes = played(study, lambda run: abs(run.rate)), {}
    for done, run in enumerate(order):
        assert predict(study, outcomes, 1).runs == len(order) - done
        outcomes[run.id] = outcome(run, abs(run.rate))
    assert sum(runs_left(study, arm, outcomes) for arm in study.arms) == 0


def test_the_predicted_time_is_steps_start_and_evaluation_and_then_what_runs_took():
    study = replace(study_of(rates="recipe", seeds=2), start_seconds=4.0, loop_seconds=0.01, evaluation_seconds=0.5)
    slow = replace(study.arms[1], seconds_per_step=0.3)
    study = replace(study, arms=(study.arms[0], slow))
    # 20 steps of 0.1 s and 10 ms in the loop, 4 s to start, 0.5 s to evaluate; the other arm's steps and evaluation
    # take three times as long, but not what the loop adds
    assert predict(study, {}, 1).seconds == pytest.approx(2 * (4 + 2.2 + 0.5) + 2 * (4 + 6.2 + 1.5))
    assert predict(study, {}, 2).seconds == pytest.approx(predict(study, {}, 1).seconds / 2)
    first = ready(study, {})[0]
    left = predict(study, {first.id: outcome(first, wall=19.0)}, 1)
    assert left.seconds == pytest.approx(19.0 + 2 * (4 + 6.2 + 1.5) * 19 / 6.7)


def test_what_follows_the_runs_is_predicted_once_however_many_run_at_a_time_and_not_when_all_have_ended():
    study = study_of(rates="recipe", seeds=2)
    closed = replace(study, closing_seconds=50.0)
    for jobs in (1, 2):
        assert predict(closed, {}, jobs).seconds - predict(study, {}, jobs).seconds == pytest.approx(50.0)
    outcomes = {}
    for run in played(study, lambda run: 1.0):
        outcomes[run.id] = outcome(run)
    assert predict(closed, outcomes, 1).seconds == 0.0


def test_a_search_is_expected_to_need_part_of_a_run_more_until_it_has_ended():
    study = replace(study_of(seeds=2), start_seconds=8.0, loop_seconds=0.0, evaluation_seconds=0.0)
    each = 8.0 + 20 * 0.1
    assert predict(study, {}, 1).seconds == pytest.approx((2 * (5 + 2) + 2 * 0.4) * each)
    outcomes = {}
    for run in played(study, lambda run: abs(run.rate)):
        if run.purpose == "rate":
            outcomes[run.id] = outcome(run, abs(run.rate), wall=each)
    assert predict(study, outcomes, 1).seconds == pytest.approx(2 * 2 * each)


def test_however_many_run_at_a_time_a_study_takes_as_long_as_the_stages_of_its_slowest_arm():
    study = replace(study_of(seeds=5), start_seconds=8.0, loop_seconds=0.0, evaluation_seconds=0.0)
    each = 8.0 + 20 * 0.1
    outcomes, left = {}, [predict(study, {}, 100).seconds]
    while runs := ready(study, outcomes):  # all of a stage at once
        outcomes |= {run.id: outcome(run, abs(run.rate), wall=each) for run in runs}
        left.append(predict(study, outcomes, 100).seconds)
    assert left == pytest.approx([3.4 * each, 2.4 * each, each, 0.0])


def test_where_no_question_was_stated_the_plan_says_so_and_asks_of_each_arm_against_the_first(tmp_path: Path):
    study = study_of("mha", "gdn")
    said = dict(describe(study, tmp_path, {}, 1))
    assert said["question"] == "none was stated; asked by default: Does gdn differ from mha?"
    assert said["expected"] == "nothing was stated"
    three = replace(study, arms=(*study.arms, replace(study.arms[1], name="swa swa mla", slug="swa")))
    assert "Do gdn and swa swa mla differ from mha?" in dict(describe(three, tmp_path, {}, 1))["question"]
    asked = replace(study.asked, question="Which?", expectation="None.")
    said = dict(describe(replace(study, asked=asked), tmp_path, {}, 1))
    assert (said["question"], said["expected"]) == ("Which?", "None.")


def test_a_run_is_an_ordinary_command(tmp_path: Path):
    study = study_of()
    run = ready(study, {})[0]
    assert command(study, tmp_path, run) == [
        "train", f"{tmp_path}/arms/mha.json", "--lr", "0.00316", "--seed", "0",
        "--output_dir", f"{tmp_path}/runs/mha-lr0.00316-seed0",
    ]  # fmt: skip
    assert command(study, tmp_path, run, resume=True) == ["train", "--resume", f"{tmp_path}/runs/mha-lr0.00316-seed0"]


def test_the_plan_says_what_will_be_done_and_how_long_it_takes(tmp_path: Path):
    said = dict(describe(study_of(question="Does a state suffice?", seeds=5), tmp_path, {}, 2))
    assert said["question"] == "Does a state suffice?"
    assert "±0.01" in said["margin"]
    assert said["runs"].startswith("20 or a few more")
    assert said["time"].startswith("about 21 s, 2 at a time")
    parts = dict(describe(study_of(question="Does a state suffice?", seeds=5), tmp_path, {}, 2, parts=4))
    assert parts["time"].startswith("about 7 s, 2 at a time in each of 4 parts that work together")
    assert said["by"].startswith("steps of all arms, timed in turns, and a short run: 0.0 s to start")
