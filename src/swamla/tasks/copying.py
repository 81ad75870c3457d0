"""Copying what came before: all of it, only what is no blank, or backwards."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swamla.errors import require
from swamla.registry import register
from swamla.tasks.task import IGNORED, Draws, Example, Task


@dataclass(frozen=True, kw_only=True)
class _Halves(Task):
    """A row of two halves: random symbols, then `|` and the answer to them, whose last symbol is a label only."""

    length: int = 64
    vocabulary: int = 17

    def __post_init__(self) -> None:
        even = self.length % 2 == 0 and self.length >= 4
        require(even, "length", self.length, "must be even and >= 4: symbols, then as many answers")
        known = 3 <= self.vocabulary <= 1 << 20
        require(known, "vocabulary", self.vocabulary, "must be from 3, two symbols and the separator, to 2^20")

    @property
    def vocab_size(self) -> int:
        """The symbols, and the separator last."""
        return self.vocabulary

    def names(self) -> Sequence[str]:
        """s0, s1, … and |."""
        return [*(f"s{n}" for n in range(self.vocabulary - 1)), "|"]

    def draw(self, random: Draws) -> Example:
        """Uniform symbols, the separator, the answer."""
        half, separator = self.length // 2, self.vocabulary - 1
        symbol_S = random.below(separator, half)
        answer_S = self.answer(symbol_S)
        labels_T = np.full(self.length, IGNORED)
        labels_T[half:] = answer_S
        return Example(np.concatenate([symbol_S, [separator], answer_S[:-1]]), labels_T)

    @abstractmethod
    def answer(self, symbol_S: np.ndarray) -> np.ndarray:
        """What is asked for after the separator."""


@register
@dataclass(frozen=True, kw_only=True)
class Copy(_Halves):
    """`s3 s1 s4 | s3 s1`: the answers at | and after it are s3, s1, s4.

    length: tokens of a row: half of them are symbols to copy.
    vocabulary: ids: the symbols and the separator.
    """

    kind: ClassVar[str] = "copy"

    def answer(self, symbol_S: np.ndarray) -> np.ndarray:
        """The symbols in their order."""
        return symbol_S


@register
@dataclass(frozen=True, kw_only=True)
class Palindrome(_Halves):
    """`s3 s1 s4 | s4 s1`: the answers at | and after it are s4, s1, s3.

    length: tokens of a row: half of them are symbols to say backwards.
    vocabulary: ids: the symbols and the separator.
    """

    kind: ClassVar[str] = "palindrome"

    def answer(self, symbol_S: np.ndarray) -> np.ndarray:
        """The symbols from the last to the first."""
        return symbol_S[::-1]


@register
@dataclass(frozen=True, kw_only=True)
class SelectiveCopy(Task):
    """`_ s3 _ _ s1 s4 _ | s3 s1`: the answers at | and after it are s3, s1, s4 (arXiv 2312.00752, section 3.1).

    Where the symbols stand among the blanks is random, so no position tells what to copy.

    length: tokens of a row.
    symbols: symbols to copy; all but twice as many of the row's tokens, less the separator, are blanks.
    vocabulary: ids: the different symbols, the blank and the separator.
    """

    kind: ClassVar[str] = "selective_copy"
    length: int = 64
    symbols: int = 8
    vocabulary: int = 18

    def __post_init__(self) -> None:
        require(self.symbols > 0, "symbols", self.symbols, "must be > 0, e.g. 8")
        room = f"must be > {2 * self.symbols}, two for each symbol: symbols among blanks, then as many answers"
        require(self.length > 2 * self.symbols, "length", self.length, room)
        known = 4 <= self.vocabulary <= 1 << 20
        require(known, "vocabulary", self.vocabulary, "must be from 4, two symbols, blank and separator, to 2^20")

    @property
    def vocab_size(self) -> int:
        """The symbols, the blank, the separator."""
        return self.vocabulary

    def names(self) -> Sequence[str]:
        """s0, s1, … then _ and |."""
        return [*(f"s{n}" for n in range(self.vocabulary - 2)), "_", "|"]

    def draw(self, random: Draws) -> Example:
        """Uniform symbols at uniform places among blanks, the separator, the symbols."""
        context, blank, separator = self.length - self.symbols, self.vocabulary - 2, self.vocabulary - 1
        symbol_S = random.below(blank, self.symbols)
        context_C = np.full(context, blank)
        context_C[np.sort(random.distinct(context, self.symbols))] = symbol_S
        labels_T = np.full(self.length, IGNORED)
        labels_T[context:] = symbol_S
        return Example(np.concatenate([context_C, [separator], symbol_S[:-1]]), labels_T)
