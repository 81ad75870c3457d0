"""The learning rate as a pure function of a run's progress, so that a run that is bounded by time anneals too."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

ScheduleName = Literal["cosine", "linear", "wsd", "constant"]

# Lowest factor in a warm-up, so that the first steps of a long one learn something.
WARMUP_FLOOR = 0.01


def warmed_up(warmup: float, progress: float, step: int) -> float:
    """How much of a linear warm-up is over at the end of step `step` (from 0), with the run's progress there: 0 … 1.

    warmup: below 1 a fraction of the run, from 1 on a number of steps.
    """
    if warmup == 0:
        return 1.0
    return min(1.0, (step + 1) / warmup if warmup >= 1 else progress / warmup)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate as a factor of its peak: a linear warm-up, then one of four shapes over the rest of the run.

    A step has the factor of the progress at its end. Of S steps with W of warm-up, step n (from 1) has n / W, at least
    `WARMUP_FLOOR`; step W has exactly 1 (step 1 without warm-up), and step S has `floor`.

    warmup: below 1 a fraction of the run, from 1 on a number of steps. If the run is bounded by time, the progress at
        the end of these steps is estimated from the pace so far.
    decay: for "wsd", the last fraction of the run, over which the rate falls linearly (arXiv 2404.06395).
    floor: the factor at the end ("constant" stays at 1).
    """

    name: ScheduleName
    warmup: float
    decay: float
    floor: float

    def factor(self, progress: float, step: int) -> float:
        """The factor of step `step` (from 0), after which the run's progress will be `progress` (0 … 1)."""
        return self._warmup_factor(progress, step) * self._shape(min(progress, 1.0), self._start(progress, step))

    def _warmup_factor(self, progress: float, step: int) -> float:
        return max(WARMUP_FLOOR, warmed_up(self.warmup, progress, step))

    def _start(self, progress: float, step: int) -> float:
        """The progress at the end of the warm-up, at least one step's; `progress` is that at the end of `step`."""
        one_step = progress / (step + 1)
        return max(self.warmup, one_step) if self.warmup < 1 else self.warmup * one_step

    def _shape(self, progress: float, start: float) -> float:
        along = (progress - start) / (1 - start) if start < progress else 0.0
        shapes: dict[ScheduleName, Callable[[], float]] = {
            "cosine": lambda: 0.5 * (1 + math.cos(math.pi * along)),
            "linear": lambda: 1 - along,
            "wsd": lambda: min(1.0, (1 - progress) / self.decay),
            "constant": lambda: 1.0,
        }
        return self.floor + (1 - self.floor) * shapes[self.name]()


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What ends a run: a number of steps, an amount of time, or whichever of the two comes first."""

    steps: int | None
    seconds: float | None

    def progress(self, step: float, seconds: float) -> float:
        """Progress after `step` steps and `seconds` of training: 0 … 1, and above 1 past the end."""
        by_step = step / self.steps if self.steps else 0.0
        by_time = seconds / self.seconds if self.seconds else 0.0
        return max(by_step, by_time)
