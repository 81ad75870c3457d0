"""Dyck words: nested brackets of several kinds (arXiv 2010.07515)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swamla.errors import require
from swamla.registry import register
from swamla.tasks.task import IGNORED, Draws, Example, Task


@register
@dataclass(frozen=True, kw_only=True)
class Dyck(Task):
    """`(1 (0 )0 (2 (2 )2`: before every closing bracket the answer is its kind, that of the last one still open.

    length: tokens of a row; what is open at its end stays so.
    brackets: kinds of brackets.
    depth: the most that are open at once.
    """

    kind: ClassVar[str] = "dyck"
    length: int = 64
    brackets: int = 4
    depth: int = 8

    def __post_init__(self) -> None:
        require(2 <= self.brackets <= 1 << 16, "brackets", self.brackets, "must be from 2 to 2^16, e.g. 4")
        require(self.depth > 0, "depth", self.depth, "must be > 0, e.g. 8")
        room = f"must be > depth = {self.depth}, so that every row closes a bracket"
        require(self.length > self.depth, "length", self.length, room)

    @property
    def vocab_size(self) -> int:
        """Opening brackets, then closing ones."""
        return 2 * self.brackets

    def names(self) -> Sequence[str]:
        """(0, (1, … and )0, )1, …"""
        return [f"{sign}{n}" for sign in "()" for n in range(self.brackets)]

    def draw(self, random: Draws) -> Example:
        """A fair walk between no open bracket and `depth` of them; the kinds of the opening ones are uniform."""
        opens, kinds = random.below(2, self.length + 1).tolist(), random.below(self.brackets, self.length + 1).tolist()
        word, stack = [], list[int]()
        for opening, kind in zip(opens, kinds, strict=True):
            if not stack or (opening and len(stack) < self.depth):
                stack.append(kind)
                word.append(kind)
            else:
                word.append(self.brackets + stack.pop())
        word_T = np.array(word)
        return Example(word_T[:-1], np.where(word_T[1:] >= self.brackets, word_T[1:], IGNORED))
