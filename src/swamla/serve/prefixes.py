"""The cache of prefixes: states after the first pieces of prompts, from which prompts that begin alike go on.

A text read in other pieces has a state that differs in its last bits, because sums have another order. So a prefix is
known by its pieces, and a prompt that goes on from one has the very state, and the very logits, that it would have
computed itself.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import pairwise

import numpy as np

from swamla.model.state import ModelState


def cut(length: int, piece: int, marks: Iterable[int] = ()) -> list[tuple[int, int]]:
    """The pieces (begin, end) in which a prompt is read: up to every multiple of `piece` tokens and every mark."""
    ends = {*range(piece, length, piece), *(mark for mark in marks if 0 < mark < length), length}
    return list(pairwise([0, *sorted(ends)]))


def names(tokens: Sequence[int], pieces: Iterable[tuple[int, int]]) -> list[bytes]:
    """The name of the prefix that ends with each piece: a hash of its tokens and of where they were cut."""
    name, found = b"", []
    for begin, end in pieces:
        name = blake2b(np.asarray(tokens[begin:end], dtype=np.int64).tobytes(), key=name, digest_size=32).digest()
        found.append(name)
    return found


class PrefixCache:
    """States of one row by the names of their prefixes, at most `capacity` bytes of them; the least recently used go.

    A capacity of 0 keeps nothing. nbytes: what is kept now.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.nbytes = capacity, 0
        self._states: OrderedDict[bytes, ModelState] = OrderedDict()

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, name: bytes) -> bool:
        return name in self._states

    def longest(self, prefixes: Sequence[bytes]) -> tuple[int, ModelState] | None:
        """How many of these pieces, named in their order, are kept, and the state after the last of them."""
        for count in range(len(prefixes), 0, -1):
            if (state := self._states.get(prefixes[count - 1])) is not None:
                for name in reversed(prefixes[:count]):  # the shorter ones are shared by more prompts
                    if name in self._states:
                        self._states.move_to_end(name)
                return count, state
        return None

    def put(self, name: bytes, state: ModelState) -> None:
        """Keep a state that nobody changes any more; one that is larger than the capacity is not kept."""
        if name in self._states or state.nbytes > self.capacity:
            return
        self._states[name] = state
        self.nbytes += state.nbytes
        while self.nbytes > self.capacity:
            _, oldest = self._states.popitem(last=False)
            self.nbytes -= oldest.nbytes
