"""Rows that come in blocks, each of a size of its own: best fits of whole documents, windows of a stream."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from functools import lru_cache

import numpy as np
import torch

from swamla.data.packing import Batch, Segments, gather_padded
from swamla.data.sampler import permutation
from swamla.data.shards import Split
from swamla.errors import require

_DOCUMENTS, _ROWS = 0, 1


class BlockRows(ABC):
    """Endless rows. Those of a block, and how many they are, are a pure function of (seed, block)."""

    def __init__(self, block_size: int, seed: int) -> None:
        require(block_size > 0, "block_size", block_size, "must be > 0, e.g. 512")
        require(seed >= 0, "seed", seed, "must be >= 0")
        self.block_size = block_size
        self.seed = seed
        self._starts = [0]  # of blocks, in samples; as far as anybody asked

    @abstractmethod
    def n_rows(self, block: int) -> int:
        """How many rows the block has."""

    @abstractmethod
    def rows(self, block: int, row: np.ndarray) -> Batch:
        """Rows of the block, by their numbers (int64)."""

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples first_sample … first_sample + count - 1."""
        while self._starts[-1] < first_sample + count:
            self._starts.append(self._starts[-1] + self.n_rows(len(self._starts) - 1))
        parts, at = [], first_sample
        while at < first_sample + count:
            block = bisect_right(self._starts, at) - 1
            stop = min(first_sample + count, self._starts[block + 1])
            parts.append(self.rows(block, np.arange(at, stop) - self._starts[block]))
            at = stop
        return parts[0] if len(parts) == 1 else join_batches(parts)

    def utilisation(self, first_sample: int, count: int) -> float:
        """Counted over these samples: positions that carry loss, of those computed."""
        batch = self.batch(first_sample, count)
        return batch.n_labels / batch.tokens_BT.numel()


def join_batches(parts: list[Batch]) -> Batch:
    """The rows of all parts, one behind the other."""
    columns = zip(*((part.tokens_BT, part.labels_BT, part.document_BT) for part in parts), strict=True)
    return Batch(*(torch.cat(column) for column in columns))


class BestFitRows(BlockRows):
    """Rows of whole documents, as far as documents fit into rows.

    In every epoch the documents are shuffled and taken `buffer_docs` at a time; each such block is packed, the longest
    document first, into the row where it leaves the least room, and its rows are shuffled. A document longer than a row
    is cut into full rows and a rest. What stays empty is padding, which carries no loss.
    """

    def __init__(self, split: Split, block_size: int, seed: int, eos_id: int, buffer_docs: int) -> None:
        super().__init__(block_size, seed)
        require(buffer_docs > 0, "buffer_docs", buffer_docs, "must be > 0, e.g. 1000")
        self._split, self._eos_id, self._buffer = split, eos_id, buffer_docs
        self._blocks = -(-split.n_documents // buffer_docs)  # in an epoch
        self._positions = split.lengths + 1
        self._order = lru_cache(2)(lambda epoch: permutation(split.n_documents, seed, epoch, _DOCUMENTS))
        self._packed = lru_cache(4)(self._pack)

    def n_rows(self, block: int) -> int:
        return len(self._packed(block)[1]) - 1

    def rows(self, block: int, row: np.ndarray) -> Batch:
        segments, starts = self._packed(block)
        row = permutation(len(starts) - 1, self.seed, block, _ROWS)[row]
        count = starts[row + 1] - starts[row]
        index = np.repeat(starts[row] - (np.cumsum(count) - count), count) + np.arange(count.sum())
        chosen = segments.take(index)
        return gather_padded(
            self._split, self._eos_id, chosen._replace(row=np.repeat(np.arange(len(row)), count)), self.block_size
        )

    def _pack(self, block: int) -> tuple[Segments, np.ndarray]:
        """The block's pieces of documents, row by row, and where each row begins among them (and the end)."""
        epoch, place = divmod(block, self._blocks)
        document = self._order(epoch)[place * self._buffer : (place + 1) * self._buffer]
        pieces = -(-self._positions[document] // self.block_size)
        piece_document = np.repeat(document, pieces)
        nth = np.arange(len(piece_document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        first = nth * self.block_size
        length = np.minimum(self._positions[piece_document] - first, self.block_size)
        row = best_fit(length, self.block_size)
        order = np.argsort(row, kind="stable")
        starts = np.searchsorted(row[order], np.arange(row.max() + 2))
        return Segments(row, piece_document, first, length).take(order), starts


def best_fit(length: np.ndarray, size: int) -> np.ndarray:
    """The row (from 0) that each piece goes to, int64: the longest first, where it leaves the least of `size` empty."""
    row_of = np.empty(len(length), dtype=np.int64)
    rows_with: list[list[int]] = [[] for _ in range(size)]  # by the room that is left in them
    some, n_rows = 0, 0  # bit r: there is a row with room for r
    for piece in np.argsort(-length, kind="stable").tolist():
        need = int(length[piece])
        fitting = some >> need
        if fitting:
            room = need + (fitting & -fitting).bit_length() - 1
            row = rows_with[room].pop()
            some ^= 0 if rows_with[room] else 1 << room
        else:
            room, row = size, n_rows
            n_rows += 1
        row_of[piece] = row
        if room > need:
            rows_with[room - need].append(row)
            some |= 1 << (room - need)
    return row_of
