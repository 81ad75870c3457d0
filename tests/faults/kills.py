"""Processes that are killed: while they save, in a step, in an evaluation, while they prune."""

import random
import signal
import time
from collections.abc import Iterator

from swamla.checkpoint import list_checkpoints
from tests.faults.rows import Row
from tests.faults.stage import Stage, assert_same_end, digests, ending, newest, step_of
from tests.waiting import until


def while_saving(stage: Stage, times: int) -> Iterator[None]:
    """One run, killed again and again at random moments of a save, each time resumed by the next process."""
    yield from _killed_in_saves(stage, times, async_save=False)


def while_saving_in_the_background(stage: Stage, times: int) -> Iterator[None]:
    """The same where a thread writes while training goes on."""
    yield from _killed_in_saves(stage, times, async_save=True)


def _killed_in_saves(stage: Stage, times: int, *, async_save: bool) -> Iterator[None]:
    settings = {"steps": 3 * times + 6, "save_interval": 1, "async_save": async_save}
    expected = stage.undisturbed(**settings)
    run_dir, rng, reached = stage.fresh(), random.Random(times), 0
    saving = run_dir / "checkpoints"
    for trial in range(times):
        with ending([stage.start(run_dir, settings=settings | {"keep_last": 2})]) as (process,):
            for _ in range(rng.randint(1, 3)):  # the save in which it dies; between them the folder is quiet
                until(lambda: not process.alive() or list(saving.glob(".saving-*")), every=0.0005)
                until(lambda: not process.alive() or not list(saving.glob(".saving-*")), every=0.0005)
            until(lambda: not process.alive() or list(saving.glob(".saving-*")), every=0.0005)
            time.sleep(0.012 * rng.random())  # a save of this size takes about that long
            process.kill()
            process.expect(-signal.SIGKILL)
        checkpoint = newest(run_dir)
        step = step_of(checkpoint)
        assert step >= reached, f"after kill {trial + 1} the newest checkpoint is of step {step}, was {reached}"
        assert checkpoint is not None
        assert digests(checkpoint) == digests(expected / "checkpoints" / checkpoint.name)
        reached = step
        if trial + 1 == times:
            stage.start(run_dir, settings=settings | {"keep_last": 2}).expect(0)
            assert_same_end(run_dir, expected)
        yield


POINTS = {
    "begin:1": 0,  # point:step, and the last step that must be in a checkpoint
    "step:3": 2,
    "accumulation:3": 2,
    "update:3": 2,
    "evaluation:4": 2,
    "save-staging:4": 2,
    "save-manifest:4": 2,
    "save-rename:4": 4,
    "prune:6": 6,
}


def at_a_point(stage: Stage, times: int) -> Iterator[None]:
    """Killed at one place of the program, then resumed."""
    expected = stage.undisturbed(steps=8)
    for point, kept in list(POINTS.items())[:times]:
        run_dir = stage.fresh()
        stage.start(run_dir, settings={"steps": 8}, env={"SWAMLA_FAULT": point}).expect(-signal.SIGKILL)
        assert step_of(newest(run_dir)) == kept, point
        stage.start(run_dir, settings={"steps": 8}).expect(0)
        assert_same_end(run_dir, expected)
        yield


def while_pruning(stage: Stage, times: int) -> Iterator[None]:
    """Killed when what is to be deleted has lost its name, and at random moments of the deletion."""
    settings = {"steps": 2 * times + 6, "save_interval": 1, "keep_last": 1}
    expected = stage.undisturbed(steps=settings["steps"], save_interval=1)
    run_dir, rng = stage.fresh(), random.Random(7)
    for trial in range(times):
        point = f"prune:{step_of(newest(run_dir)) + 2}"
        stage.start(run_dir, settings=settings, env={"SWAMLA_FAULT": point}).expect(-signal.SIGKILL)
        left = list_checkpoints(run_dir / "checkpoints")
        assert left, "pruning left no checkpoint"
        checkpoint = newest(run_dir)
        assert checkpoint == left[-1]
        if rng.random() < 0.5:  # some of what was being deleted is gone already
            for doomed in (run_dir / "checkpoints").glob(".deleting-*/*.safetensors"):
                doomed.unlink()
                break
        if trial + 1 == times:
            stage.start(run_dir, settings=settings).expect(0)
            assert_same_end(run_dir, expected)
            assert not list((run_dir / "checkpoints").glob(".*"))
        yield


ROWS = [
    Row(
        fault="kill −9 at random moments while saving",
        expected="the newest verified checkpoint loads, the curve afterwards is bit-identical",
        how="SIGKILL up to 12 ms after a save began, one run resumed after each",
        trials=while_saving,
        short=2,
        long=50,
    ),
    Row(
        fault="kill −9 at random moments while saving in the background",
        expected="the same",
        how="the same with `async_save`",
        trials=while_saving_in_the_background,
        short=1,
        long=25,
    ),
    Row(
        fault="kill −9 mid-step, mid-accumulation, in an evaluation, in a save, at the first step",
        expected="at most one save interval lost; the resumed run's curve and weights are the undisturbed one's",
        how="`SWAMLA_FAULT` at " + ", ".join(f"`{point}`" for point in POINTS),
        trials=at_a_point,
        short=3,
        long=len(POINTS),
    ),
    Row(
        fault="pruning killed half-way",
        expected="always at least one valid checkpoint; the remains are removed by the next save",
        how="`SWAMLA_FAULT=prune:N` with `keep_last` 1, then also a part of the deleted removed",
        trials=while_pruning,
        short=1,
        long=10,
    ),
]
