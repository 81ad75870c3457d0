"""Tokens on disk: one memory-mapped .npy of ids per split, with the offsets and byte counts of its documents."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from swamla.errors import CorruptError, DataError

_DTYPES = (np.dtype(np.uint16), np.dtype(np.uint32))
_SCANNED = 1 << 24


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds every id of the vocabulary. DataError if there is none."""
    for dtype in _DTYPES:
        if vocab_size - 1 <= np.iinfo(dtype).max:
            return dtype
    raise DataError(f"a vocabulary of {vocab_size} is too large: shards hold ids below 2^32")


class ArrayWriter:
    """Appends to a one-dimensional .npy file whose length is known only in the end."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        self.count = 0
        self._file: BinaryIO = path.open("wb")
        self._write_header()
        self._header_size = self._file.tell()

    def append(self, values: Any) -> None:
        """Write `values` behind what is there. DataError for one that the file's type cannot hold."""
        array = np.asarray(values)
        if array.dtype != self.dtype:
            array = self._fitting(array.astype(np.int64))
        self._file.write(array.tobytes())
        self.count += len(array)

    def _fitting(self, array: np.ndarray) -> np.ndarray:
        """Whole numbers as the file's type; DataError for one that it cannot hold."""
        limits = np.iinfo(self.dtype)
        unfit = np.flatnonzero((array < limits.min) | (array > limits.max))
        if len(unfit):
            at = int(unfit[0])
            raise DataError(
                f"{self.path.name}: offset {self.count + at}: id {array[at]} is too large for {self.dtype} "
                f"(0 to {limits.max}); does the tokenizer state its vocabulary size?"
            )
        return array.astype(self.dtype)

    def _write_header(self) -> None:
        # NumPy pads the header so that the length may grow in place
        header = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.count,)}
        npy.write_array_header_1_0(self._file, header)

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._file:
            self._file.seek(0)
            self._write_header()
            assert self._file.tell() == self._header_size


def open_array(path: Path) -> np.ndarray:
    """A one-dimensional integer .npy, memory-mapped. CorruptError if it is anything else, pickled objects included."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise CorruptError(f"{path}: the shard is missing") from error
    except (ValueError, OSError, EOFError) as error:
        raise CorruptError(f"{path}: not an array of integers, or pickled, which is never loaded ({error})") from error
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu":
        raise CorruptError(f"{path}: needs a one-dimensional .npy of integers")
    return array


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """The documents of one split, as ids without specials.

    tokens: all ids (memory-mapped). offsets: where each document begins, and the end (n_documents + 1).
    byte_counts: the UTF-8 bytes of each document.
    """

    path: Path
    tokens: np.ndarray
    offsets: np.ndarray
    byte_counts: np.ndarray
    vocab_size: int

    @classmethod
    def open(cls, folder: Path, name: str, vocab_size: int) -> "Split":
        """The split `name` in a dataset's folder. CorruptError if its parts do not fit each other."""
        path = folder / f"{name}.tokens.npy"
        tokens = open_array(path)
        offsets_path = folder / f"{name}.offsets.npy"
        offsets, byte_counts = open_array(offsets_path), open_array(folder / f"{name}.bytes.npy")
        if tokens.dtype not in _DTYPES:
            raise CorruptError(f"{path}: needs uint16 or uint32, got {tokens.dtype}")
        if len(offsets) != len(byte_counts) + 1 or offsets[0] != 0 or offsets[-1] != len(tokens):
            raise CorruptError(f"{offsets_path}: belongs to other tokens or byte counts; delete {folder}")
        if (np.diff(offsets) <= 0).any():
            raise CorruptError(f"{offsets_path}: documents do not follow one another; delete {folder}")
        return cls(path=path, tokens=tokens, offsets=offsets, byte_counts=byte_counts, vocab_size=vocab_size)

    @property
    def n_documents(self) -> int:
        return len(self.byte_counts)

    @property
    def n_tokens(self) -> int:
        """Ids without specials; each document adds one position to learn, its end."""
        return len(self.tokens)

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return int(self.byte_counts.sum())

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64."""
        return np.diff(self.offsets)

    def document(self, index: int) -> np.ndarray:
        """The ids of one document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def require_known(self, ids: np.ndarray, positions: np.ndarray) -> None:
        """Raise CorruptError naming shard and offset if an id, read at these positions, is not of the vocabulary."""
        if len(ids) and ids.max() >= self.vocab_size:
            at = int(ids.argmax())
            raise CorruptError(
                f"{self.path}: offset {positions[at]}: token id {ids[at]} is outside of the vocabulary "
                f"(0 to {self.vocab_size - 1}); delete {self.path.parent} to have it made again"
            )

    def verify(self) -> None:
        """Scan all ids. CorruptError for one outside of the vocabulary."""
        for start in range(0, self.n_tokens, _SCANNED):
            ids = self.tokens[start : start + _SCANNED]
            self.require_known(ids, np.arange(start, start + len(ids)))


def documents_shared(tested: Split, trained: Split) -> int:
    """How many documents of `tested` are in `trained` too, token for token; both made with one tokenizer."""
    alike = np.flatnonzero(np.isin(trained.lengths, tested.lengths))  # others need not be read
    known = {_digest(trained.document(int(index))) for index in alike}
    return sum(_digest(tested.document(index)) in known for index in range(tested.n_documents))


def _digest(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(ids.astype(np.uint32).tobytes(), digest_size=16).digest()
