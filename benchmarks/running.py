"""What all tables share: how contenders take turns, what fails, what it may cost in time, where the rows go."""

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
    """What a race found of one contender.

    timing: of a call.
    peak_bytes: what its first call took at most, beyond what was there.
    """

    timing: Timing
    peak_bytes: int

    def row(self) -> Row:
        """The figures as a row has them."""
        timing = self.timing
        return {"median_s": timing.median, "low_s": timing.low, "high_s": timing.high, "rounds": timing.rounds}


class Turn:
    """A contender's turn: the first also finds its peak memory; one that failed is passed over from then on.

    It takes its own time, as preparing to see memory takes some, too.
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
        except Exception as error:  # its row says so, and the others go on
            self.error = error

    def _timed(self) -> None:
        begin = time.perf_counter()
        self.run()
        self.seconds.append(time.perf_counter() - begin)


@contextmanager
def nothing_to_collect() -> Iterator[None]:
    """What is there now is passed over by the collector, not looked through in the middle of a round."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclass(kw_only=True)
class Bench:
    """One benchmark run.

    results: where rows go.
    quick: whether to try everything at tiny sizes, one round each, for figures that mean nothing.
    nanogpt: a checkout of nanoGPT, if it is a contender.
    """

    results: Results
    quick: bool = False
    nanogpt: Path | None = None
    deadline: float = float("inf")

    def allow(self, seconds: float) -> None:
        """From now on a table may take so long: no race begins after that, and no further round of one."""
        self.deadline = time.monotonic() + seconds

    def race(
        self, table: str, what: Row, makers: Mapping[str, Maker], *, rounds: int, limit: float, warmup: int = 1
    ) -> dict[str, Outcome]:
        """Make contenders and let them take turns; those that fail get a row that says why, and are left out.

        what: the part of the rows' keys that all contenders share. limit: seconds after which no further round begins.
        """
        gc.collect()  # the contenders of the race before, which hold each other
        torch.manual_seed(0)  # the same weights and inputs in every run
        left = self.deadline - time.monotonic()
        if left <= 0:
            self.leave_out(table, what, makers, "the table's time was spent")
            return {}
        self.results.say(readable(f"{table}:", {"name": " · ".join(makers), **what}))
        turns = {name: turn for name in makers if (turn := self._made(table, what, name, makers[name])) is not None}
        with nothing_to_collect():
            interleaved(turns, rounds=1 if self.quick else rounds, warmup=warmup, limit=min(limit, left))
        outcomes = {}
        for name, turn in turns.items():
            if turn.error is not None or turn.peak_bytes is None:
                self._failed(table, what, name, turn.error)
            else:
                outcomes[name] = Outcome(timing=Timing.of(turn.seconds[warmup:]), peak_bytes=turn.peak_bytes)
        return outcomes

    def leave_out(self, table: str, what: Row, names: Mapping[str, object] | tuple[str, ...], why: str) -> None:
        """Rows that say what was not measured, and why."""
        for name in names:
            self.results.add(table, {"name": name, **what, "note": f"not run: {why}"})

    def _made(self, table: str, what: Row, name: str, maker: Maker) -> Turn | None:
        try:
            return Turn(maker())
        except Exception as error:
            self._failed(table, what, name, error)
            return None

    def _failed(self, table: str, what: Row, name: str, error: Exception | None) -> None:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        self.results.add(table, {"name": name, **what, "error": told})


def times_faster(baseline: Outcome | None, own: Outcome) -> float | None:
    """How many times as fast as the baseline of the same rounds; none without one."""
    return None if baseline is None else baseline.timing.median / own.timing.median
