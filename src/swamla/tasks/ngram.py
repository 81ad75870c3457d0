"""In-context n-grams: every row has a language of its own, to be learned while it is read (arXiv 2401.12973)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swamla.errors import require
from swamla.registry import register
from swamla.tasks.task import IGNORED, Draws, Example, Task


@register
@dataclass(frozen=True, kw_only=True)
class NGram(Task):
    """`. s1 s4 s2 s2 . s0 s1 s4`: where the last tokens were there before, the answer is what followed them there.

    The row's language is a random table: what follows each sequence of n − 1 symbols. The text is runs of it, each from
    a random beginning, with a stop before each. Asked is what comes next, wherever the last n − 1 symbols were followed
    by it before in this row.

    length: tokens of a row.
    n: tokens of an n-gram; 2 asks what followed one token, 3 what followed two.
    run: symbols between two stops.
    vocabulary: ids: the symbols and the stop.
    """

    kind: ClassVar[str] = "ngram"
    length: int = 128
    n: int = 3
    run: int = 12
    vocabulary: int = 9

    def __post_init__(self) -> None:
        require(self.n >= 2, "n", self.n, "must be >= 2, e.g. 3")
        require(self.run >= self.n, "run", self.run, f"must be >= n = {self.n}, so that a run has an n-gram")
        room = f"must be >= {2 * (self.run + 1)}: two runs and their stops"
        require(self.length >= 2 * (self.run + 1), "length", self.length, room)
        require(self.vocabulary >= 3, "vocabulary", self.vocabulary, "must be >= 3, two symbols and the stop, e.g. 9")
        contexts = (self.vocabulary - 1) ** (self.n - 1)
        most = (
            f"has {contexts} sequences of n - 1 = {self.n - 1} symbols: must be at most length = {self.length} of them"
        )
        require(contexts <= self.length, "vocabulary", self.vocabulary, f"{most}, so that they come again")

    @property
    def vocab_size(self) -> int:
        """The symbols and the stop."""
        return self.vocabulary

    def names(self) -> Sequence[str]:
        """s0, s1, … and the stop."""
        return [*(f"s{n}" for n in range(self.vocabulary - 1)), "."]

    def draw(self, random: Draws) -> Example:
        """A table, and runs of it."""
        symbols, known = self.vocabulary - 1, self.n - 1
        follower = random.below(symbols, symbols**known).tolist()
        runs = self.length // (self.run + 1) + 1
        beginnings = random.below(symbols, runs * known).reshape(runs, known).tolist()
        tokens, labels, seen = list[int](), list[int](), set[int]()
        for beginning in beginnings:
            tokens += [symbols, *beginning]
            labels += [IGNORED] * known
            for _ in range(self.run - known):
                context = 0
                for symbol in tokens[-known:]:
                    context = context * symbols + symbol
                labels.append(follower[context] if context in seen else IGNORED)
                seen.add(context)
                tokens.append(follower[context])
            labels.append(IGNORED)  # a stop comes next, or is the last token of all
        return Example(np.array(tokens[: self.length]), np.array(labels[: self.length]))
