"""Rows of one state that sequences take and leave; the rows in use are always the first, and are stepped as one batch.

The state of most mixers has a constant size. Where it grows with the text, all rows have room for the same number of
tokens, which doubles when the longest needs more and falls back when no row is in use.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from swamla.model.language_model import LanguageModel
from swamla.model.state import ModelState

BLOCK = 256  # tokens of room that a row begins with


class Slots:
    """At most `count` sequences that are decoded together. limit: the tokens that a sequence may reach.

    To be used under `torch.inference_mode()`.
    """

    def __init__(self, model: LanguageModel, count: int, limit: int) -> None:
        self.model, self.count, self.limit = model, count, limit
        self.lengths: list[int] = []
        self._state: ModelState | None = None
        self._view: ModelState | None = None  # the rows in use, until another joins or leaves

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of the state of all rows, in use or not."""
        return self._state.nbytes if self._state is not None else 0

    def join(self, state: ModelState) -> None:
        """Copy the only row of `state` into the next row. Raises `IndexError` if all are in use."""
        if len(self) == self.count:
            raise IndexError(f"all {self.count} slots are in use")
        pool = self._with_room(state.longest + 1)
        pool.copy_row(len(self), state)
        self.lengths.append(state.longest)
        self._view = None

    def leave(self, row: int) -> None:
        """Free a row; the last row in use takes its place."""
        last = len(self) - 1
        assert self._state is not None
        if row != last:
            self._state.copy_row(row, self._state, last)
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        self._view = None
        if not self.lengths and self._state.max_len > self._room(1):
            self._state = None

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Logits (B, V) after one more token in each row in use."""
        pool = self._with_room(max(self.lengths) + 1)
        if self._view is None:
            self._view = pool.first(len(self))
        tokens_B1 = torch.tensor(tokens, device=self.model.device)[:, None]
        logits_BV = self.model.step(tokens_B1, self._view)[:, -1]
        self.lengths = [length + 1 for length in self.lengths]
        return logits_BV

    def reset(self) -> None:
        """Free all rows and their memory."""
        self.lengths, self._state, self._view = [], None, None

    def _with_room(self, length: int) -> ModelState:
        room = self._room(length)
        if self._state is None:
            self._state = self.model.init_state(self.count, room)
        elif room > self._state.max_len:
            self.model.grow(self._state, room)
            self._view = None
        assert self._state is not None
        return self._state

    def _room(self, length: int) -> int:
        return room_for(length, self.limit)


def room_for(length: int, limit: int) -> int:
    """The tokens that a state is made for: `BLOCK` times a power of two, at most `limit`.

    MLA reads its cache in steps of 256 tokens while there is room: a rule of its own, whatever the text's length, lets
    equal prefixes be computed by the same operations.
    """
    room = BLOCK
    while room < length:
        room *= 2
    return min(room, limit)
