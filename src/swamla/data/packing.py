"""Documents as one stream of positions, and rows cut from it without waste.

A document d_0 … d_{n-1} takes n + 1 positions: inputs [eos, d_0 … d_{n-1}], labels [d_0 … d_{n-1}, eos]. So every
position carries loss, the end of a document is learned once, and no label belongs to another document than its input.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from swamla.data.shards import Split
from swamla.ops.layout import PADDING

NO_LABEL = -100


@dataclass(frozen=True)
class Batch:
    """Rows to learn from or to be judged by.

    tokens_BT, labels_BT: int64 ids; a label of -100 carries no loss. document_BT: int64, counts the documents of a
    row from 0; -1 is padding. All on the CPU.
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    document_BT: Tensor

    @property
    def n_labels(self) -> int:
        """How many positions carry loss."""
        return int((self.labels_BT != NO_LABEL).sum())

    def cut_share(self, eos_id: int) -> float:
        """Of the stretches of documents in these rows: those that are not the whole document."""
        starts_BT = self.document_BT.diff(dim=1, prepend=torch.full_like(self.document_BT[:, :1], -2)) != 0
        ends_BT = self.document_BT.diff(dim=1, append=torch.full_like(self.document_BT[:, :1], -2)) != 0
        real_BT = self.document_BT != PADDING
        whole_start = (self.tokens_BT == eos_id)[starts_BT & real_BT]
        whole_end = (self.labels_BT == eos_id)[ends_BT & real_BT]
        return 1 - float((whole_start & whole_end).float().mean())


class Segments(NamedTuple):
    """Stretches of single documents, in the order in which they fill the rows."""

    row: np.ndarray
    document: np.ndarray
    first: np.ndarray  # position inside the document
    length: np.ndarray

    def take(self, index: np.ndarray) -> "Segments":
        return Segments(*(column[index] for column in self))


class DocumentStream:
    """All documents of a split, epoch after epoch, as one endless stream of positions.

    order(epoch): the documents' permutation in that epoch, int64 (n_documents).
    """

    def __init__(self, split: Split, eos_id: int, order: Callable[[int], np.ndarray]) -> None:
        self._split, self._eos_id, self._order = split, eos_id, order
        self._positions = split.lengths + 1
        self.epoch_length = split.n_tokens + split.n_documents
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def rows(self, start_B: np.ndarray, length: int) -> Batch:
        """Rows of `length` positions, each from its place `start_B` (int64) in the stream."""
        segments = self._segments(start_B, length)
        shape = len(start_B), length
        tokens, labels = _gather(self._split, self._eos_id, segments)
        documents = np.repeat(_place_in_row(segments.row), segments.length)
        return Batch(*(torch.from_numpy(flat.reshape(shape)) for flat in (tokens, labels, documents)))

    def _segments(self, start_B: np.ndarray, length: int) -> Segments:
        """Cut the rows at the starts of epochs, then of documents."""
        epoch_B, last_B = start_B // self.epoch_length, (start_B + length - 1) // self.epoch_length
        row, step = _spread(last_B - epoch_B + 1)
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
        interval, step = _spread(last - first + 1)
        place = first[interval] + step
        document_begin = ends[place] - self._positions[order[place]]
        start = np.maximum(document_begin, begin[interval])
        stop = np.minimum(ends[place], end[interval])
        return Segments(row[interval], order[place], start - document_begin, stop - start)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents in their order, and where each ends; the two latest epochs are kept."""
        if epoch not in self._epochs:
            order = self._order(epoch)
            while len(self._epochs) > 1:
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = order, np.cumsum(self._positions[order])
        return self._epochs[epoch]


def gather_padded(split: Split, eos_id: int, segments: Segments, length: int) -> Batch:
    """Rows of `length` positions that the segments, ordered by row from 0, need not fill."""
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
    """Inputs and labels of the segments, end to end, int64."""
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


def _spread(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For counts [2, 1, 3]: which [0, 0, 1, 2, 2, 2], and how far into it [0, 1, 0, 0, 1, 2]."""
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
