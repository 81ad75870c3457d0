"""The shape of a row of the fault matrix."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.faults.stage import Stage

Trials = Callable[[Stage, int], Iterator[None]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A fault, what should follow from it, and the trials that show whether it does.

    trials: called with a stage and a number of trials; yields once for each that went as expected, and raises for one
    that did not. short, long: how many trials there are in `make test` and in `make faults`; short 0 for what would
    take too long there. tests: further ones of the suite that belong to the fault, as pytest names them, run with
    `make faults` and counted there.
    """

    fault: str
    expected: str
    how: str
    trials: Trials | None = None
    short: int = 1
    long: int = 1
    tests: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.trials is not None or self.tests, f"{self.fault}: nothing is tried"
