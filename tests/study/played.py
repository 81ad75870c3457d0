"""Played studies: results as if their runs had been trained, with and without what a page shows beside the scores."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from swamla.data.config import DataConfig
from swamla.interpret.repeats import LayerInduction, Repeats
from swamla.study.decoding import Generation
from swamla.study.evidence import Answers, Curves, Evidence, Measured, Positions, Speed, caches
from swamla.study.folder import Test as Score
from swamla.study.plan import Arm, Study
from swamla.study.results import Results
from swamla.study.runs import Outcome, Pace, ready
from swamla.study.statistics import Axis

from .helpers import sized, study_of


def results_of(
    difference: float = 0.05,
    *,
    fails: tuple[str, ...] = (),
    spread: float = 0.001,
    page: bool = False,
    task: bool = False,
    sizes: Mapping[int, float] = MappingProxyType({}),
    accuracies: Mapping[str, Sequence[float]] = MappingProxyType({}),
    **asked,
) -> Results:
    """A study of five seeds whose second arm differs so; runs whose name has one of `fails` diverge.

    page: with evidence.  task: of a task's answers, not of a text.  sizes: width → the difference there.
    accuracies: arm → those of its seeds, instead of ones that differ so.
    """
    study = study_of(**{"seeds": 5} | asked)
    study = sized(study, *sizes) if sizes else study
    if task:
        study = of_task(study)
    outcomes: dict[str, Outcome] = {}
    while runs := ready(study, outcomes):
        run = runs[0]
        lost = any(word in run.id for word in fails)
        kept = {name: getattr(run, name) for name in ("arm", "purpose", "rate", "lr", "seed")}
        outcomes[run.id] = Outcome(
            run=run.id,
            status="diverged" if lost else "finished",
            validation=None if lost else 1.5 + abs(run.rate - 0.1) / 10,
            steps=7 if lost else 20,
            tokens=2560,
            seconds=3.0,
            wall=5.0,
            error="no finite gradient in 20 steps <in a row>" if lost else "",
            **kept,
        )
    tests = [
        Score(
            run=one.run,
            arm=one.arm,
            seed=one.seed,
            loss=1.0,
            tokens=1000,
            **{
                "accuracy" if task else "bits_per_byte": (0.4 if task else 1.3)
                + 0.01 * one.seed
                + _apart(study.arm(one.arm), one.seed, sizes, difference, spread)
            }
            | ({"accuracy": accuracies[one.arm][one.seed - 1]} if accuracies else {}),
        )
        for one in outcomes.values()
        if one.purpose == "seed" and one.status == "finished"
    ]
    return Results.of(study, outcomes, tests, evidence_of(study, tests) if page else None)


def _apart(arm: Arm, seed: int, sizes: Mapping[int, float], difference: float, spread: float) -> float:
    """How much worse the second arm is; at a size its seeds are spread in another order."""
    if arm.label != "gdn":
        return 0.0
    if arm.size is None:
        return difference + spread * (seed - 3)
    return sizes[arm.size] + spread * (0, -2, 1, 0, 2, -1)[(seed + arm.size) % 5 + 1]


def of_task(study: Study) -> Study:
    """The study with a task as its data."""
    data = DataConfig(source="task:mqar?pairs=2&length=32", tokenizer="names")
    arms = tuple(replace(arm, config=replace(arm.config, data=data)) for arm in study.arms)
    axis = Axis(name="accuracy", direction="higher", margin=0.02)
    return replace(study, arms=arms, axis=axis, data={"source": data.source, "fingerprint": "f"})


def evidence_of(study: Study, tests: list[Score]) -> Evidence:
    """Evidence of each run that was scored: figures that follow from its arm and seed."""
    arms = [arm for arm in study.arms if any(test.arm == arm.name for test in tests)]
    tokens = [64.0 + 128 * at for at in range(20)]
    fall = [3 + 5 * math.exp(-at / 4) for at in range(20)]
    drawn = []
    for arm in arms:
        number = int(arm.label == "gdn")
        apart = ([0.1 * number - 0.01 * at for at in range(20)], [-0.1] * 20, [0.2] * 20) if number else ([], [], [])
        loss = [each + 0.1 * number for each in fall]
        bands = [each - 0.1 for each in loss], [each + 0.1 for each in loss]
        drawn.append(Curves(arm=arm.name, tokens=tokens, loss=(loss, *bands), difference=apart))
    return Evidence(
        curves=tuple(drawn),
        measured=tuple(_answered(test) if study.task else _measured(test) for test in tests),
        speed={arm.name: Speed(median=0.1, low=0.09, high=0.12, rounds=9) for arm in arms},
        memory={arm.name: 500 << 20 for arm in arms},
        caches=caches(study),
        decoding={
            arm.name: [
                Generation(prompt=n, median=0.002, low=0.0019, high=0.0025, first=0.01, tokens=288, state=32 * n)
                for n in (32, 128)
            ]
            for arm in study.arms
        },
        paces=tuple(Pace(arm=arm.name, runs=10, predicted=6.0, took=5.0) for arm in arms),
    )


def _answered(test: Score) -> Measured:
    """Three seeds of an arm have learned the task."""
    accuracy = 0.995 if test.seed > 2 else 0.4
    size = 4096 if test.arm.startswith("gdn") else 32768
    found = Answers(accuracy=accuracy, low=accuracy - 0.004, high=accuracy + 0.004, queries=1024, state_bytes=size)
    return Measured(run=test.run, arm=test.arm, seed=test.seed, answers=found)


def _measured(test: Score) -> Measured:
    worse = 0.1 if test.arm.startswith("gdn") else 0.0
    layer = LayerInduction(
        previous=(0.8, 0.1),
        duplicate=(0.1, 0.2),
        induction=(0.1, 0.7),
        induction_conv=(0.1, 0.7),
        hit=(0.1, 0.9),
        attribution=(-0.2, 0.8 - worse),
        conv=1,
        cut=2.5 - worse,
        cut_conv=2.5 - worse,
        control=0.01,
    )
    return Measured(
        run=test.run,
        arm=test.arm,
        seed=test.seed,
        positions=Positions(
            first=(1, 2, 3, 5, 9, 17),
            last=(1, 2, 4, 8, 16, 32),
            loss=tuple(4 - 0.3 * at + 0.01 * test.seed + worse * at for at in range(6)),
            tokens=(40, 40, 80, 160, 300, 380),
        ),
        repeats=Repeats(accuracy=0.9, chance=0.02, first_loss=5.5, second_loss=0.8, layers=(layer,)),
        length=50,
        rows=64,
    )
