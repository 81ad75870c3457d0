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
    """`t3 t9 t5 t2 t8 t5 t2 t8 t5`: ids that never come again, then others over and over; asked is what follows them.

    Every id but those of the prefix repeats with the row's period, and from its second occurrence on the answer is the
    id that followed it before. Prefix and period have another length in every row, since fixed ones are solved by
    looking that many positions back, which softmax attention learns from positions alone. Without a prefix the answer
    is also the id that was seen longest ago; behind one, that is an id of the prefix. Of the ids that repeat it still
    is: heads show whether a model does induction (`swamla.interpret`), and accuracy alone does not.

    length: tokens of a row.
    prefix: the most ids before those that repeat; their number is uniform from 0 to it.
    shortest, longest: the period is uniform between them, both included.
    vocabulary: ids.
    """

    kind: ClassVar[str] = "induction"
    length: int = 64
    prefix: int = 16
    shortest: int = 8
    longest: int = 24
    vocabulary: int = 64

    def __post_init__(self) -> None:
        require(self.prefix >= 0, "prefix", self.prefix, "must be >= 0, e.g. 16")
        require(self.shortest >= 2, "shortest", self.shortest, "must be >= 2, e.g. 8")
        longer = f"must be > shortest = {self.shortest}: one period for all rows is solved by position"
        require(self.longest > self.shortest, "longest", self.longest, longer)
        least = self.prefix + 2 * self.longest
        room = f"must be >= {least}, the prefix and twice the longest period, so that every row repeats"
        require(self.length >= least, "length", self.length, room)
        different = self.prefix + self.longest
        enough = f"must be from prefix + longest = {different}, all different, to 2^20"
        require(different <= self.vocabulary <= 1 << 20, "vocabulary", self.vocabulary, enough)

    @property
    def vocab_size(self) -> int:
        """The tokens."""
        return self.vocabulary

    def names(self) -> Sequence[str]:
        """t0, t1, …"""
        return [f"t{n}" for n in range(self.vocabulary)]

    def draw(self, random: Draws) -> Example:
        """A random prefix, then a random period of other ids, repeated to the row's end."""
        prefix, period = random.integer(0, self.prefix), random.integer(self.shortest, self.longest)
        distinct_N = random.distinct(self.vocabulary, prefix + period)
        time_T = np.arange(self.length + 1)
        row_T = distinct_N[np.where(time_T < prefix, time_T, prefix + (time_T - prefix) % period)]
        labels_T = row_T[1:].copy()
        labels_T[: prefix + period] = IGNORED
        return Example(row_T[:-1], labels_T)
