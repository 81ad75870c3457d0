"""Packing: documents to training rows. Row i is a pure function of (seed, i), with random access.

A document d_0 … d_{n-1} takes n + 1 positions: inputs [eos, d_0 … d_{n-1}], labels [d_0 … d_{n-1}, eos]. So every
position carries loss, the end of every document is learned once, and input and label are of the same document.
`PackedRows` cuts an endless stream of documents into full rows; `BestFitRows` fits whole documents into rows.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from swamla.data.shards import Split
from swamla.errors import require
from swamla.ops.layout import PADDING

NO_LABEL = -100
_DOCUMENTS, _ROWS = 0, 1  # part of a permutation's key: what is permuted


@dataclass(frozen=True)
class Batch:
    """Rows for training or evaluation, on the CPU.

    tokens_BT, labels_BT: int64 ids; a label of -100 carries no loss. document_BT: int64, numbers the documents of a row
    from 0; -1 is padding.
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    document_BT: Tensor

    @property
    def n_labels(self) -> int:
        """The number of positions that carry loss."""
        return int((self.labels_BT != NO_LABEL).sum())

    def cut_share(self, eos_id: int) -> float:
        """The share of segments in these rows that are not a whole document."""
        starts_BT = self.document_BT.diff(dim=1, prepend=torch.full_like(self.document_BT[:, :1], -2)) != 0
        ends_BT = self.document_BT.diff(dim=1, append=torch.full_like(self.document_BT[:, :1], -2)) != 0
        real_BT = self.document_BT != PADDING
        whole_start = (self.tokens_BT == eos_id)[starts_BT & real_BT]
        whole_end = (self.labels_BT == eos_id)[ends_BT & real_BT]
        return 1 - float((whole_start & whole_end).float().mean())


class Segments(NamedTuple):
    """Segments of documents, in the order in which they fill the rows."""

    row: np.ndarray
    document: np.ndarray
    first: np.ndarray  # position inside the document
    length: np.ndarray

    def take(self, index: np.ndarray) -> "Segments":
        return Segments(*(column[index] for column in self))


def permutation(count: int, *key: int) -> np.ndarray:
    """A permutation of 0 … count - 1 that depends on `key` alone, int64 (count).

    Sorts raw Philox words: NumPy guarantees that these never change, but not that `Generator.permutation` does not.
    """
    bits = np.random.Philox(np.random.SeedSequence(list(key)))
    return np.argsort(bits.random_raw(count), kind="stable")


class PackedRows:
    """The endless training rows of a split: in every epoch, documents are shuffled, cut into rows, and rows shuffled.

    A row belongs to the epoch in which it begins, and may extend into the next one. Every position is in exactly one
    row.
    """

    def __init__(self, split: Split, block_size: int, seed: int, eos_id: int) -> None:
        require(block_size > 0, "block_size", block_size, "must be > 0, e.g. 512")
        require(seed >= 0, "seed", seed, "must be >= 0")
        self.block_size = block_size
        self._stream = DocumentStream(
            split, eos_id, lambda epoch: permutation(split.n_documents, seed, epoch, _DOCUMENTS)
        )
        self.epoch_length = self._stream.epoch_length
        # an epoch's order of rows is large; two are needed where a batch crosses from one epoch to the next
        self._row_order = lru_cache(2)(lambda epoch: permutation(self._rows_in(epoch), seed, epoch, _ROWS))

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples first_sample … first_sample + count - 1."""
        sample = np.arange(first_sample, first_sample + count, dtype=np.int64)
        epoch = sample * self.block_size // self.epoch_length
        row = np.empty_like(sample)
        for e in np.unique(epoch):
            begin = self._first_row(int(e))
            mine = epoch == e
            row[mine] = begin + self._row_order(int(e))[sample[mine] - begin]
        return self._stream.rows(row * self.block_size, self.block_size)

    def _first_row(self, epoch: int) -> int:
        return -(-epoch * self.epoch_length // self.block_size)

    def _rows_in(self, epoch: int) -> int:
        return self._first_row(epoch + 1) - self._first_row(epoch)


class HeldOutRows:
    """The rows of all documents of a split, once and in order; the last row is padded."""

    def __init__(self, split: Split, block_size: int, eos_id: int) -> None:
        require(block_size > 0, "block_size", block_size, "must be > 0, e.g. 512")
        self.block_size = block_size
        self._stream = DocumentStream(split, eos_id, lambda epoch: np.arange(split.n_documents))
        self.n_labels = self._stream.epoch_length
        self.n_rows = -(-self.n_labels // block_size)

    def batches(self, batch_size: int, most_rows: int | None = None) -> Iterator[Batch]:
        """Batches of `batch_size` rows, the last one smaller: all rows, or `most_rows` evenly spaced ones."""
        count = min(self.n_rows, most_rows or self.n_rows)
        chosen = np.arange(count) * self.n_rows // count
        for first in range(0, count, batch_size):
            start_B = chosen[first : first + batch_size] * self.block_size
            yield pad(self._stream.rows(start_B, self.block_size), self.n_labels - start_B)


class BlockRows(ABC):
    """Endless rows in blocks; the rows of a block and their number are a pure function of (seed, block)."""

    def __init__(self, block_size: int, seed: int) -> None:
        require(block_size > 0, "block_size", block_size, "must be > 0, e.g. 512")
        require(seed >= 0, "seed", seed, "must be >= 0")
        self.block_size = block_size
        self.seed = seed
        self._starts = [0]  # first sample of each block, as far as known

    @abstractmethod
    def n_rows(self, block: int) -> int:
        """The number of rows of a block."""

    @abstractmethod
    def rows(self, block: int, row: np.ndarray) -> Batch:
        """Rows of a block, by their numbers (int64)."""

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


class BestFitRows(BlockRows):
    """Best-fit packing: rows of whole documents.

    In every epoch the documents are shuffled and divided into blocks of `buffer_docs`. A block's documents, longest
    first, go into the row with the least sufficient room, and its rows are shuffled. A document longer than a row is
    cut into full rows and a rest. The remaining positions are padding, which carries no loss.
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

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the first epoch, the first ones of all; later epochs are divided otherwise, and may have others."""
        return sum(self.n_rows(block) for block in range(self._blocks))

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
        """The segments of a block, ordered by row, and the index of each row's first segment (and the end)."""
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
    """The row of each piece, int64: longest piece first, each into the row of `size` with the least sufficient room."""
    row_of = np.empty(len(length), dtype=np.int64)
    rows_with: list[list[int]] = [[] for _ in range(size)]  # room left → rows
    some, n_rows = 0, 0  # bit r of `some`: there is a row with room r
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


class DocumentStream:
    """All documents of a split, concatenated epoch after epoch to an endless stream of positions.

    order(epoch): the permutation of the documents in that epoch, int64 (n_documents).
    """

    def __init__(self, split: Split, eos_id: int, order: Callable[[int], np.ndarray]) -> None:
        self._split, self._eos_id, self._order = split, eos_id, order
        self._positions = split.lengths + 1
        self.epoch_length = split.n_tokens + split.n_documents
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def rows(self, start_B: np.ndarray, length: int) -> Batch:
        """Rows of `length` positions, from the positions `start_B` (int64) of the stream."""
        segments = self._segments(start_B, length)
        shape = len(start_B), length
        tokens, labels = _gather(self._split, self._eos_id, segments)
        documents = np.repeat(_place_in_row(segments.row), segments.length)
        return Batch(*(torch.from_numpy(flat.reshape(shape)) for flat in (tokens, labels, documents)))

    def _segments(self, start_B: np.ndarray, length: int) -> Segments:
        """Cut the rows at the starts of epochs, then of documents."""
        epoch_B, last_B = start_B // self.epoch_length, (start_B + length - 1) // self.epoch_length
        row, step = _expand(last_B - epoch_B + 1)
        epoch = epoch_B[row] + step
        begin = np.maximum(start_B[row] - epoch * self.epoch_length, 0)
        end = np.minimum(start_B[row] + length - epoch * self.epoch_length, self.epoch_length)
        parts = [self._within_epoch(e, row[epoch == e], begin[epoch == e], end[epoch == e]) for e in np.unique(epoch)]
        joined = Segments(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
        return joined.take(np.argsort(joined.row, kind="stable"))  # epochs ascend, so they stay in order in each row

    def _within_epoch(self, epoch: int, row: np.ndarray, begin: np.ndarray, end: np.ndarray) -> Segments:
        order, ends = self._epoch(int(epoch))
        first = np.searchsorted(ends, begin, side="right")
        last = np.searchsorted(ends, end - 1, side="right")
        interval, step = _expand(last - first + 1)
        place = first[interval] + step
        document_begin = ends[place] - self._positions[order[place]]
        start = np.maximum(document_begin, begin[interval])
        stop = np.minimum(ends[place], end[interval])
        return Segments(row[interval], order[place], start - document_begin, stop - start)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the documents in an epoch, and the end of each; the two latest epochs are cached."""
        if epoch not in self._epochs:
            order = self._order(epoch)
            while len(self._epochs) > 1:
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = order, np.cumsum(self._positions[order])
        return self._epochs[epoch]


def gather_padded(split: Split, eos_id: int, segments: Segments, length: int) -> Batch:
    """Rows of `length` positions from segments that are ordered by row; the rest of each row is padding."""
    flat = _gather(split, eos_id, segments)
    documents = np.repeat(_place_in_row(segments.row), segments.length)
    row = np.repeat(segments.row, segments.length)
    column = np.arange(len(row)) - np.searchsorted(row, row)
    padded = []
    for values, nothing in ((flat[0], 0), (flat[1], NO_LABEL), (documents, PADDING)):
        target = np.full((int(row[-1]) + 1, length), nothing, dtype=np.int64)
        target[row, column] = values
        padded.append(torch.from_numpy(target))
    return Batch(*padded)


def _gather(split: Split, eos_id: int, segments: Segments) -> tuple[np.ndarray, np.ndarray]:
    """The concatenated inputs and labels of the segments, int64."""
    begin = np.cumsum(segments.length) - segments.length
    source = split.offsets[segments.document] + segments.first  # of the label; the input is the one before
    position = np.repeat(source - begin, segments.length)
    position += np.arange(len(position))
    raw = split.tokens[np.minimum(position, split.n_tokens - 1)]
    split.require_known(raw, position)
    labels = raw.astype(np.int64)
    n_positions = split.offsets[segments.document + 1] - split.offsets[segments.document] + 1
    complete = segments.first + segments.length == n_positions
    labels[(begin + segments.length - 1)[complete]] = eos_id
    tokens = np.roll(labels, 1)
    before = split.tokens[np.maximum(source - 1, 0)]
    split.require_known(before, source - 1)
    tokens[begin] = np.where(segments.first == 0, eos_id, before)
    return tokens, labels


def _place_in_row(row: np.ndarray) -> np.ndarray:
    """For rows [3, 3, 5, 5, 5]: [0, 1, 0, 1, 2]."""
    index = np.arange(len(row))
    return index - np.maximum.accumulate(np.where(np.diff(row, prepend=-1) > 0, index, 0))


def _expand(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For counts [2, 1, 3]: indices [0, 0, 1, 2, 2, 2], and the position within each [0, 1, 0, 0, 1, 2]."""
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)


def join_batches(parts: list[Batch]) -> Batch:
    """The concatenated rows of all parts."""
    columns = zip(*((part.tokens_BT, part.labels_BT, part.document_BT) for part in parts), strict=True)
    return Batch(*(torch.cat(column) for column in columns))


def pad(batch: Batch, n_labels_B: np.ndarray) -> Batch:
    """The batch with all positions from `n_labels_B` on replaced by padding."""
    beyond_BT = torch.arange(batch.tokens_BT.shape[1]) >= torch.from_numpy(n_labels_B)[:, None]
    return Batch(
        batch.tokens_BT.masked_fill(beyond_BT, 0),
        batch.labels_BT.masked_fill(beyond_BT, NO_LABEL),
        batch.document_BT.masked_fill(beyond_BT, PADDING),
    )
