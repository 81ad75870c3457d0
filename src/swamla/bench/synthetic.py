"""Synthetic data for benchmarks: random ids, in the format of prepared data, so that training's loader reads them."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from swamla.data.dataset import PreparedDataset
from swamla.data.shards import ArrayWriter, token_dtype
from swamla.data.tokenizer import CharTokenizer

DOCUMENT = 1000  # mean tokens of a document; lengths are exponentially distributed
TOKENS = 1 << 21
_FIRST_CHARACTER = 0x10000  # of the vocabulary; Unicode has 2**20 characters from here on


def synthetic_dataset(folder: Path, vocab_size: int, *, tokens: int = TOKENS, buffer_docs: int = 0) -> PreparedDataset:
    """A dataset in `folder` with about `tokens` random ids below `vocab_size`."""
    tokenizer = CharTokenizer("".join(map(chr, range(_FIRST_CHARACTER, _FIRST_CHARACTER + vocab_size - 1))))
    random = np.random.default_rng(0)
    lengths = 1 + random.exponential(DOCUMENT - 1, size=max(1, tokens // DOCUMENT)).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = random.integers(tokenizer.eos_id, size=offsets[-1])
    for name, values, kind in (
        ("tokens", ids, token_dtype(vocab_size)),
        ("offsets", offsets, np.int64),
        ("bytes", lengths, np.int64),
    ):
        with ArrayWriter(folder / f"train.{name}.npy", kind) as writer:
            writer.append(values)
    return PreparedDataset(folder, {"fingerprint": "synthetic"}, tokenizer, buffer_docs=buffer_docs)


def random_prompt(length: int, vocab_size: int) -> list[int]:
    """Random ids as a prompt."""
    return _random_ids((length,), vocab_size).tolist()


def _random_ids(shape: tuple[int, ...], vocab_size: int) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))


def whole_rows(rows: int, length: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and documents (rows, length), with one document per row."""
    ids_BT = _random_ids((rows, length + 1), vocab_size)
    return ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous(), torch.zeros(rows, length, dtype=torch.int64)
