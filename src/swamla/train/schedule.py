"""The learning rate as a pure function of how far the run is, so that a run that is bounded by time anneals as well."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

ScheduleName = Literal["cosine", "linear", "wsd", "constant"]

# The first steps of a warm-up learn something, however long it is.
WARMUP_FLOOR = 0.01


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Warm-up to the peak learning rate, then one of four shapes over what is left of the run, as a factor of the peak.

    Each step has the factor of its end: of S steps with W of warm-up, the n-th (from 1) has n / W up to the peak, and
    `WARMUP_FLOOR` at least; the W-th has the peak exactly (the first where there is no warm-up), the S-th the floor.

    warmup: below 1 a fraction of the run, from 1 on a number of steps. In a run that is bounded by time the fraction
        which these are is taken from the pace so far; in one of a known number of steps that is exact.
    decay: "wsd" only: the last fraction of the run, over which the rate falls linearly (arXiv 2404.06395).
    floor: the factor at the end ("constant" stays at 1).
    """

    name: ScheduleName
    warmup: float
    decay: float
    floor: float

    def factor(self, progress: float, step: int) -> float:
        """The factor for step `step` (from 0) of a run that will be `progress` (0 … 1) of the way through after it."""
        return self._warmup_factor(progress, step) * self._shape(min(progress, 1.0), self._start(progress, step))

    def _warmup_factor(self, progress: float, step: int) -> float:
        if self.warmup == 0:
            return 1.0
        ramp = (step + 1) / self.warmup if self.warmup >= 1 else progress / self.warmup
        return min(1.0, max(WARMUP_FLOOR, ramp))

    def _start(self, progress: float, step: int) -> float:
        """The progress at the end of the warm-up, or of the first step; `progress` is that at the end of `step`."""
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
        """How far a run is after `step` steps and `seconds` of time: 0 … 1, and beyond when it overran."""
        by_step = step / self.steps if self.steps else 0.0
        by_time = seconds / self.seconds if self.seconds else 0.0
        return max(by_step, by_time)
