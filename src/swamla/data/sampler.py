"""Which rows to learn from: sample i is a pure function of (seed, i), whoever asks, and in whatever order."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

from swamla.data.packing import NO_LABEL, Batch, DocumentStream
from swamla.data.shards import Split
from swamla.errors import require
from swamla.ops.layout import PADDING

_DOCUMENTS, _ROWS = 0, 1


def permutation(count: int, *key: int) -> np.ndarray:
    """A permutation of `count` things that depends on `key` alone, int64 (count).

    It sorts raw Philox words: NumPy promises these, but not `Generator.permutation`, to stay the same for ever.
    """
    bits = np.random.Philox(np.random.SeedSequence(list(key)))
    return np.argsort(bits.random_raw(count), kind="stable")


class PackedRows:
    """The endless training rows of a split: documents are shuffled in every epoch, rows within it.

    Epoch e holds the rows that begin in it; every position of it is in exactly one row, and a row at its end runs on
    into the next epoch.
    """

    def __init__(self, split: Split, block_size: int, seed: int, eos_id: int) -> None:
        require(block_size > 0, "block_size", block_size, "must be > 0, e.g. 512")
        require(seed >= 0, "seed", seed, "must be >= 0")
        self.block_size = block_size
        self._stream = DocumentStream(
            split, eos_id, lambda epoch: permutation(split.n_documents, seed, epoch, _DOCUMENTS)
        )
        self.epoch_length = self._stream.epoch_length
        # one epoch's order of rows is large; the next is needed only where a batch straddles both
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

    def utilisation(self, first_sample: int, count: int) -> float:
        """Counted over these samples: positions that carry loss, of those computed."""
        batch = self.batch(first_sample, count)
        return batch.n_labels / batch.tokens_BT.numel()

    def _first_row(self, epoch: int) -> int:
        return -(-epoch * self.epoch_length // self.block_size)

    def _rows_in(self, epoch: int) -> int:
        return self._first_row(epoch + 1) - self._first_row(epoch)


class HeldOutRows:
    """All documents of a split, once and in order; the last row is padded."""

    def __init__(self, split: Split, block_size: int, eos_id: int) -> None:
        require(block_size > 0, "block_size", block_size, "must be > 0, e.g. 512")
        self.block_size = block_size
        self._stream = DocumentStream(split, eos_id, lambda epoch: np.arange(split.n_documents))
        self.n_labels = self._stream.epoch_length
        self.n_rows = -(-self.n_labels // block_size)

    def batches(self, batch_size: int, most_rows: int | None = None) -> Iterator[Batch]:
        """Batches of `batch_size` rows, the last with what is left: all, or `most_rows` spread evenly over them."""
        count = min(self.n_rows, most_rows or self.n_rows)
        chosen = np.arange(count) * self.n_rows // count
        for first in range(0, count, batch_size):
            start_B = chosen[first : first + batch_size] * self.block_size
            yield pad(self._stream.rows(start_B, self.block_size), self.n_labels - start_B)


def pad(batch: Batch, n_labels_B: np.ndarray) -> Batch:
    """The batch with everything behind the first `n_labels_B` positions of a row turned into padding."""
    beyond_BT = torch.arange(batch.tokens_BT.shape[1]) >= torch.from_numpy(n_labels_B)[:, None]
    return Batch(
        batch.tokens_BT.masked_fill(beyond_BT, 0),
        batch.labels_BT.masked_fill(beyond_BT, NO_LABEL),
        batch.document_BT.masked_fill(beyond_BT, PADDING),
    )
