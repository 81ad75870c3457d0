"""Shared by all tables: run contenders alternately within a time limit, and record results and failures."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from swamla.bench.measuring import Run, Timing, interleaved, peak_memory
from swamla.bench.results import Results, Row, readable

Maker = Callable[[], Run]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one contender in a race.

    timing: of a call.
    peak_bytes: peak memory of its first call, above that before it.
    """

    timing: Timing
    peak_bytes: int

    def row(self) -> Row:
        """The timing as the figures of a row."""
        timing = self.timing
        return {"median_s": timing.median, "low_s": timing.low, "high_s": timing.high, "rounds": timing.rounds}


class Contestant:
    """A contender in a race. Its first call also measures peak memory; after a failure further calls do nothing.

    It measures its own time, because preparing to measure memory takes time too.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.seconds: list[float] = []
        self.peak_bytes: int | None = None
        self.error: Exception | None = None

    def __call__(self) -> None:
        if self.error is not None:
            return
        try:
            if self.peak_bytes is None:
                self.peak_bytes = peak_memory(self._timed)
            else:
                self._timed()
        except Exception as error:  # reported in its row; the others go on
            self.error = error

    def _timed(self) -> None:
        begin = time.perf_counter()
        self.run()
        self.seconds.append(time.perf_counter() - begin)


@contextmanager
def frozen_garbage_collector() -> Iterator[None]:
    """Context in which the garbage collector ignores existing objects, so that it does not disturb a round."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclass(kw_only=True)
class Bench:
    """One benchmark run.

    results: where rows go.
    quick: run everything at tiny sizes, one round each; the figures mean nothing.
    nanogpt: a checkout of nanoGPT, if it is a contender.
    """

    results: Results
    quick: bool = False
    nanogpt: Path | None = None
    deadline: float = float("inf")

    def allow(self, seconds: float) -> None:
        """Set the deadline of a table: after it no race and no further round starts."""
        self.deadline = time.monotonic() + seconds

    def race(
        self, table: str, what: Row, makers: Mapping[str, Maker], *, rounds: int, limit: float, warmup: int = 1
    ) -> dict[str, Outcome]:
        """Build the contenders and run them alternately. A contender that fails gets a row with its error.

        what: entries that all contenders' rows share. limit: seconds after which no further round starts.
        """
        gc.collect()  # free the contenders of the last race, which are in reference cycles
        torch.manual_seed(0)  # the same weights and inputs in every run
        left = self.deadline - time.monotonic()
        if left <= 0:
            self.leave_out(table, what, makers, "the table's time was spent")
            return {}
        self.results.say(readable(f"{table}:", {"name": " · ".join(makers), **what}))
        made = {name: self._made(table, what, name, maker) for name, maker in makers.items()}
        running = {name: contestant for name, contestant in made.items() if contestant is not None}
        with frozen_garbage_collector():
            interleaved(running, rounds=1 if self.quick else rounds, warmup=warmup, limit=min(limit, left))
        outcomes = {}
        for name, contestant in running.items():
            if contestant.error is not None or contestant.peak_bytes is None:
                self._failed(table, what, name, contestant.error)
            else:
                timing = Timing.of(contestant.seconds[warmup:])
                outcomes[name] = Outcome(timing=timing, peak_bytes=contestant.peak_bytes)
        return outcomes

    def leave_out(self, table: str, what: Row, names: Mapping[str, object] | tuple[str, ...], why: str) -> None:
        """Add rows for contenders that were not measured, with the reason."""
        for name in names:
            self.results.add(table, {"name": name, **what, "note": f"not run: {why}"})

    def _made(self, table: str, what: Row, name: str, maker: Maker) -> Contestant | None:
        try:
            return Contestant(maker())
        except Exception as error:
            self._failed(table, what, name, error)
            return None

    def _failed(self, table: str, what: Row, name: str, error: Exception | None) -> None:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        self.results.add(table, {"name": name, **what, "error": message})


def times_faster(baseline: Outcome | None, own: Outcome) -> float | None:
    """Speed relative to the baseline in the same rounds; None without a baseline."""
    return None if baseline is None else baseline.timing.median / own.timing.median
