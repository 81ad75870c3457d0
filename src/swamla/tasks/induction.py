"""Induction: after a token, say what followed it before (arXiv 2209.11895)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swamla.errors import require
from swamla.registry import register
from swamla.tasks.task import IGNORED, Draws, Example, Task


@register
@dataclass(frozen=True, kw_only=True)
class Induction(Task):
    """`t5 t2 t8 t5 t2 t8 t5`: distinct tokens, over and over; from the second t5 on the answer is the next token.

    Every row has a period of its own: with one period for all rows, looking that many positions back is enough, which
    softmax attention learns from positions alone, without any induction head.

    length: tokens of a row.
    shortest, longest: the period is uniform between them, both included.
    vocabulary: ids.
    """

    kind: ClassVar[str] = "induction"
    length: int = 64
    shortest: int = 8
    longest: int = 32
    vocabulary: int = 64

    def __post_init__(self) -> None:
        require(self.shortest >= 2, "shortest", self.shortest, "must be >= 2, e.g. 8")
        longer = f"must be > shortest = {self.shortest}: one period for all rows is solved by position"
        require(self.longest > self.shortest, "longest", self.longest, longer)
        room = f"must be >= {2 * self.longest}, twice the longest period, so that every row repeats"
        require(self.length >= 2 * self.longest, "length", self.length, room)
        enough = self.longest <= self.vocabulary <= 1 << 20
        require(enough, "vocabulary", self.vocabulary, f"must be from longest = {self.longest}, all different, to 2^20")

    @property
    def vocab_size(self) -> int:
        """The tokens."""
        return self.vocabulary

    def names(self) -> Sequence[str]:
        """t0, t1, …"""
        return [f"t{n}" for n in range(self.vocabulary)]

    def draw(self, random: Draws) -> Example:
        """A random period of distinct tokens, repeated to the row's end."""
        period = random.integer(self.shortest, self.longest)
        repeated_T = random.distinct(self.vocabulary, period)[np.arange(self.length + 1) % period]
        labels_T = repeated_T[1:].copy()
        labels_T[:period] = IGNORED
        return Example(repeated_T[:-1], labels_T)
