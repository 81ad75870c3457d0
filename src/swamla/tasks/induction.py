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

    With `pieces` the ids come again in pieces of the period: each begins anywhere in it, goes on in its order (behind
    the last id with the first), and ends somewhere. Asked is where the latest occurrence of an id was followed by the
    same id as now. Neither what was seen longest ago nor what stands any number of positions back answers more than a
    few of these queries; what most often followed the id before answers nearly all, the latest of it all.

    length: tokens of a row.
    prefix: the most ids before those that repeat; their number is uniform from 0 to it.
    shortest, longest: the period is uniform between them, both included.
    vocabulary: ids.
    pieces: the most ids of a piece, whose number is uniform from 2 to it; 0 for whole periods, one after the other.
    """

    kind: ClassVar[str] = "induction"
    length: int = 64
    prefix: int = 16
    shortest: int = 8
    longest: int = 24
    vocabulary: int = 64
    pieces: int = 0

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
        if self.pieces:
            cut = f"must be 0, for whole periods, or from 2 to shortest - 1 = {self.shortest - 1}"
            require(2 <= self.pieces < self.shortest, "pieces", self.pieces, cut)

    @property
    def vocab_size(self) -> int:
        """The tokens."""
        return self.vocabulary

    def names(self) -> Sequence[str]:
        """t0, t1, …"""
        return [f"t{n}" for n in range(self.vocabulary)]

    def draw(self, random: Draws) -> Example:
        """A random prefix, then a random period of other ids, which come again to the row's end."""
        prefix, period = random.integer(0, self.prefix), random.integer(self.shortest, self.longest)
        distinct_N = random.distinct(self.vocabulary, prefix + period)
        time_T = np.arange(self.length + 1)
        place_T = time_T - prefix  # in the endless row of periods; < 0 in the prefix
        if self.pieces:
            place_T[prefix + period :] = self._in_pieces(random, period, self.length + 1 - prefix - period)
        row_T = distinct_N[np.where(time_T < prefix, time_T, prefix + place_T % period)]
        asked_T = self._asked(row_T) if self.pieces else time_T[:-1] >= prefix + period
        return Example(row_T[:-1], np.where(asked_T, row_T[1:], IGNORED))

    def _in_pieces(self, random: Draws, period: int, count: int) -> np.ndarray:
        """`count` places of the period, a piece of it after the other; none goes on where the one before ended."""
        places, last = list[int](), period - 1
        while len(places) < count:
            begin = last + random.integer(2, period - 1)  # neither the id that the last piece ended with nor its next
            places += range(begin, begin + random.integer(2, self.pieces))
            last = places[-1]
        return np.array(places[:count])

    def _asked(self, row_T: np.ndarray) -> np.ndarray:
        """Of every token but the last: whether its latest occurrence was followed by the same id, bool."""
        followed, asked = dict[int, int](), list[bool]()
        for token, after in zip(row_T[:-1].tolist(), row_T[1:].tolist(), strict=True):
            asked.append(followed.get(token) == after)
            followed[token] = after
        return np.array(asked)
