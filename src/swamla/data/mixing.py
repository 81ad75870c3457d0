"""Mixtures: rows of several sources, by weight."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from swamla.data.dataset import Dataset, Rows
from swamla.data.packing import Batch, join_batches, permutation
from swamla.data.shards import Split, join_splits

CYCLE = 4096  # rows; in each cycle every source has exactly its share, rounded to whole rows
_SOURCES = 3  # key of this permutation, beside those of packing.py


def shares(weights: Sequence[float], total: int) -> np.ndarray:
    """`total` divided by weights into integers >= 1, int64, by the largest-remainder method."""
    exact = np.asarray(weights, dtype=np.float64) * total / sum(weights)
    counts = np.maximum(np.floor(exact), 1).astype(np.int64)
    while counts.sum() != total:
        step = 1 if counts.sum() < total else -1
        change = np.where((counts > 1) | (step > 0), step * (exact - counts), -np.inf)
        counts[int(np.argmax(change))] += step
    return counts


class MixtureRows:
    """Interleaved rows of several sources: the source of sample i is a pure function of (seed, i).

    The rows of each source come in the order that they have without the others.
    """

    def __init__(self, sources: list[Rows], weights: Sequence[float], seed: int) -> None:
        self._sources, self._seed = sources, seed
        self._shares = shares(weights, CYCLE)
        self._slots = np.repeat(np.arange(len(sources)), self._shares)

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples first_sample … first_sample + count - 1."""
        sample = np.arange(first_sample, first_sample + count, dtype=np.int64)
        source, index = self.places(sample)
        parts, order = [], []
        for which in np.unique(source):
            mine = np.flatnonzero(source == which)
            first = int(index[mine[0]])  # the samples are consecutive, and so are those of each source
            parts.append(self._sources[which].batch(first, len(mine)))
            order.append(mine)
        back = torch.from_numpy(np.argsort(np.concatenate(order)))
        joined = join_batches(parts)
        return Batch(joined.tokens_BT[back], joined.labels_BT[back], joined.document_BT[back])

    def places(self, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each sample, and its index among that source's samples."""
        source, index = np.empty_like(sample), np.empty_like(sample)
        for cycle in np.unique(sample // CYCLE):
            slots = self._slots[permutation(CYCLE, self._seed, int(cycle), _SOURCES)]
            rank = np.empty(CYCLE, dtype=np.int64)
            for which, share in enumerate(self._shares):
                rank[slots == which] = np.arange(share) + cycle * share
            mine = sample // CYCLE == cycle
            source[mine], index[mine] = slots[sample[mine] % CYCLE], rank[sample[mine] % CYCLE]
        return source, index


class MixtureDataset(Dataset):
    """Several datasets with one tokenizer, and the weights of their rows."""

    def __init__(self, parts: list[Dataset], weights: Sequence[float]) -> None:
        self.parts, self.weights = parts, [weight / sum(weights) for weight in weights]
        self.path, self.tokenizer = parts[0].path, parts[0].tokenizer
        content = ["mixture", self.weights, [part.fingerprint for part in parts]]
        self.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def source(self) -> str:
        return "mixture"

    @cached_property
    def train(self) -> Split:
        return join_splits([part.train for part in self.parts])

    @cached_property
    def held_out(self) -> Split:
        return join_splits([part.held_out for part in self.parts])

    def rows(self, block_size: int, seed: int) -> MixtureRows:
        return MixtureRows([part.rows(block_size, seed) for part in self.parts], self.weights, seed)

    @property
    def bytes_per_label(self) -> float:
        return sum(weight * part.bytes_per_label for weight, part in zip(self.weights, self.parts, strict=True))

    def epochs(self) -> dict[str, int]:
        parts = zip(self.parts, self.weights, strict=True)
        return {name: round(n / weight) for part, weight in parts for name, n in part.epochs().items()}

    def identity(self) -> list[dict[str, str]]:
        return [each for part in self.parts for each in part.identity()]

    def verify(self) -> None:
        for part in self.parts:
            part.verify()

    def held_out_text(self) -> bytes:
        return b"".join(part.held_out_text() for part in self.parts)

    def describe(self) -> list[tuple[str, str]]:
        rows: list[tuple[str, str]] = []
        for weight, part in zip(self.weights, self.parts, strict=True):
            rows += [("mixture", f"{weight:.2%} of the rows from"), *part.describe()]
        return rows
