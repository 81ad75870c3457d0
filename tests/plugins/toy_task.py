"""A task in one file: counting on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

import swamla
from swamla.errors import require
from swamla.tasks import Draws, Example, Task


@swamla.register
@dataclass(frozen=True, kw_only=True)
class ToyTask(Task):
    """`5 6 7 0`: the answer is the next number, and after the last one 0.

    length: tokens of a row.
    numbers: how many there are.
    """

    kind: ClassVar[str] = "toy_count"
    length: int = 16
    numbers: int = 1000

    def __post_init__(self) -> None:
        require(self.length >= 2, "length", self.length, "must be >= 2, e.g. 16")
        require(self.numbers >= 2, "numbers", self.numbers, "must be >= 2, e.g. 1000")

    @property
    def vocab_size(self) -> int:
        """The numbers."""
        return self.numbers

    def names(self) -> Sequence[str]:
        """Their digits."""
        return [str(number) for number in range(self.numbers)]

    def draw(self, random: Draws) -> Example:
        """From a random number on."""
        counted_T = (random.integer(0, self.numbers - 1) + np.arange(self.length + 1)) % self.numbers
        return Example(counted_T[:-1], counted_T[1:])
