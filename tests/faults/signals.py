"""Being asked to stop: by Slurm's warning, by a preempted machine."""

import signal
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

from tests.faults import acts
from tests.faults.rows import Row
from tests.faults.stage import Stage, assert_same_end, ending, newest, step_of
from tests.waiting import until

SETTINGS = {"steps": 8}
# (signal, what it interrupts, options of the run, the step that is the last one then)
PLACES: list[tuple[str, Any, int]] = [
    ("in a step", partial(acts.signal_in_step, step=3), 3),
    ("in an evaluation", partial(acts.signal_in_evaluation, step=4), 4),
    ("in a save", partial(acts.signal_in_save, step=6), 6),
]


def anywhere(stage: Stage, times: int) -> Iterator[None]:
    """Each signal at each place, with data prepared ahead and with workers that encode it meanwhile."""
    numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP)
    cases = list(product((False, True), numbers, PLACES))
    for stream, number, (where, twist, last) in cases[:times]:
        expected = _undisturbed(stage, stream)
        run_dir = stage.fresh()
        said = stage.start(
            run_dir, settings=SETTINGS, stream=stream, twist=partial(twist, signal.Signals(number))
        ).expect(75)
        assert f"stopped by {number.name} after step {last}; all is saved" in said, (where, said)
        assert step_of(newest(run_dir)) == last, where
        stage.start(run_dir, settings=SETTINGS, stream=stream).expect(0)
        assert_same_end(run_dir, expected)
        yield


def _undisturbed(stage: Stage, stream: bool) -> Any:
    if not stream:
        return stage.undisturbed(**SETTINGS)
    run_dir = stage.folder / "undisturbed-stream"
    if not run_dir.exists():
        stage.start(run_dir, settings=SETTINGS, stream=True).expect(0)
    return run_dir


def while_compiling(stage: Stage, times: int) -> Iterator[None]:
    """A signal from outside, in the first step, which compiles."""
    settings = {"steps": 2, "compile": "default", "eval_interval": None}
    for number in (signal.SIGUSR1, signal.SIGTERM)[:times]:
        run_dir = stage.fresh()
        made = stage.fresh("cache")
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(made), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        with ending([stage.start(run_dir, settings=settings, env=cache)]) as (process,):
            until(lambda made=made, process=process: any(made.rglob("*.py")) or not process.alive())
            process.kill(number)
            said = process.expect(75)
        assert f"stopped by {number.name} after step 1; all is saved" in said, said
        assert step_of(newest(run_dir)) == 1
        yield


ROWS = [
    Row(
        fault="SIGTERM, SIGUSR1, SIGHUP in a step, an evaluation or a save, also with workers that encode data",
        expected="the step is finished, all is saved, exit 75; the resumed run is the undisturbed one to the bit",
        how="the process signals itself at the place",
        trials=anywhere,
        short=3,
        long=2 * 3 * len(PLACES),
    ),
    Row(
        fault="SIGTERM, SIGUSR1 while torch.compile is at work",
        expected="the same",
        how="a signal from outside once the first generated file is there",
        trials=while_compiling,
        short=0,
        long=2,
    ),
]
