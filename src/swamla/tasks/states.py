"""State tracking: the product of everything so far, in a group of permutations (arXiv 2404.08819, 2411.12537)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import ClassVar, Literal

import numpy as np

from swamla.errors import require
from swamla.registry import register
from swamla.tasks.task import Draws, Example, Task

_PLACES = {"parity": 2, "s3": 3, "s5": 5}


@register
@dataclass(frozen=True, kw_only=True)
class StateTracking(Task):
    """`213 132 213`: each token permutes what is there; at every position the answer is the state after it.

    Token g_t and state s_t are permutations, s_t = g_t ∘ s_{t−1}: of two places (parity), three, or five.

    length: tokens of a row.
    group: parity, s3 or s5. The word problem of s5 is NC¹-complete.
    moves: "all" permutations are tokens, and the state is uniform given all of them but one, so that no part of them
        tells anything; or only "swaps" of two places, each a reflection: then the position tells the state's sign, and
        half of the states are out of question.
    """

    kind: ClassVar[str] = "state_tracking"
    length: int = 64
    group: Literal["parity", "s3", "s5"] = "s3"
    moves: Literal["all", "swaps"] = "all"

    def __post_init__(self) -> None:
        require(self.length >= 2, "length", self.length, "must be >= 2, e.g. 64")
        alone = self.group != "parity" or self.moves == "all"
        require(alone, "moves", self.moves, 'must be "all" for parity: of two places there is one swap only')

    @property
    def vocab_size(self) -> int:
        """The elements of the group."""
        return len(_elements(self.group))

    def names(self) -> Sequence[str]:
        """123, 132, … of what stands at each place; of parity 0 and 1."""
        if self.group == "parity":
            return ["0", "1"]
        return ["".join(str(place + 1) for place in element) for element in _elements(self.group)]

    def draw(self, random: Draws) -> Example:
        """Uniform moves, and their products."""
        moves, product = _moves(self.group, self.moves), _products(self.group)
        tokens_T = moves[random.below(len(moves), self.length)]
        states, state = [], 0
        for move in tokens_T.tolist():
            state = product[move][state]
            states.append(state)
        return Example(tokens_T, np.array(states))


def _elements(group: str) -> list[tuple[int, ...]]:
    """All permutations in the order of the alphabet; the first changes nothing."""
    return list(permutations(range(_PLACES[group])))


@cache
def _moves(group: str, moves: str) -> np.ndarray:
    elements = _elements(group)
    displaced = [sum(place != at for at, place in enumerate(element)) for element in elements]
    return np.array([index for index, count in enumerate(displaced) if moves == "all" or count == 2])


@cache
def _products(group: str) -> list[list[int]]:
    """[g][s] is the element g ∘ s: first s, then g."""
    elements = _elements(group)
    number = {element: index for index, element in enumerate(elements)}
    return [[number[tuple(g[place] for place in s)] for s in elements] for g in elements]
