"""Shards: split documents into training and held-out ones, encode and write them, and memory-map them as a `Split`.

A split is three .npy files: `NAME.tokens.npy`, the ids of all documents without special tokens; `NAME.offsets.npy`, the
begin of each document, and the end; `NAME.bytes.npy`, the UTF-8 bytes of each. Held-out text is stored as well.
"""

import hashlib
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from swamla.data.tokenizer import Tokenizer, utf8
from swamla.errors import CorruptError, DataError

# stage, documents done, bytes done, and about which share of the stage is done: 0 … 1, None if unknown
Progress = Callable[[str, int, int, float | None], None]

HELD_OUT_TEXT = "held_out.txt"
PIECE = 1 << 18  # characters encoded at once; the library needs some hundred bytes for each
_BATCH = 1 << 21  # characters per call of `encode_batch`
_CONTEXT = 256  # characters on each side of a cut that are encoded to check it
_CANDIDATES = 16  # possible cuts that are tried
_CUT = re.compile(r"(?<=\n)(?=\S)|(?<=\w)(?=[\n ])")
_DTYPES = (np.dtype(np.uint16), np.dtype(np.uint32))
PLACES = 2**64
_SCANNED = _COPIED = 1 << 24  # ids read at a time


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out `fraction` of all documents, by the SHA-256 of its text.

    Equal texts are on the same side, whatever their file, row, name or compression. A byte-order mark and the kind of
    line ends are ignored.
    """
    return place_of(text) < fraction * PLACES


def place_of(text: str) -> int:
    """The place of a text among all possible ones, 0 … 2⁶⁴ − 1."""
    identity = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    digest = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def usable_fraction(documents: Iterable[str], fraction: float) -> float:
    """`fraction`; if it holds out none or all of several different documents, the nearest that leaves one on each side.

    Reads all documents: for small sources, of which this happens to one in five with 30 documents and 5 %.
    """
    if fraction == 1:
        return fraction
    return usable_fraction_of({place_of(text) for text in documents}, fraction)


def usable_fraction_of(places: Collection[int], fraction: float) -> float:
    """`usable_fraction` of documents at these places."""
    if fraction == 1 or len(places) < 2:
        return fraction
    least, most = math.nextafter(float(min(places)), math.inf), math.nextafter(float(max(places)), 0.0)
    return min(max(fraction * PLACES, least), most) / PLACES


def divide(documents: Iterable[str], fraction: float) -> tuple[str, Iterator[tuple[str, bool]]]:
    """The rule of the split, for display, and (text, held out?) for each document.

    An only document is cut in two, and its last characters are held out.
    """
    remaining = iter(documents)
    first = list(islice(remaining, 2))
    if len(first) == 1 and fraction < 1:
        return f"the last {100 * fraction:g} % of the only document's characters", _cut(first[0], fraction)
    return rule_for_many(fraction), ((text, is_held_out(text, fraction)) for text in chain(first, remaining))


def rule_for_many(fraction: float) -> str:
    """The rule by which several documents are split, for display."""
    return "all of it" if fraction == 1 else f"{100 * fraction:.4g} % of documents, by a hash of their text"


def _cut(text: str, fraction: float) -> Iterator[tuple[str, bool]]:
    """A text cut into its training and its held-out part, at the same place for \\n and \\r\\n line ends."""
    pairs = [match.start() for match in re.finditer("\r\n", text)]
    kept = int((len(text) - len(pairs)) * (1 - fraction))  # counting \r\n as one character
    at = kept + sum(1 for earlier, place in enumerate(pairs) if place - earlier < kept)
    yield text[:at], False
    yield text[at:], True


class Encoded(NamedTuple):
    """Numbers of documents, tokens and bytes.  lossless: the held-out tokens decode to exactly their text."""

    train: int
    held_out: int
    train_tokens: int
    tokens: int
    bytes: int
    lossless: bool


def encode_documents(
    documents: Iterable[tuple[str, bool]],
    tokenizer: Tokenizer,
    folder: Path,
    progress: Callable[[int, int], None],
) -> Encoded:
    """Write the shards and the held-out text of (text, held out?) pairs into `folder`.

    `progress(documents, bytes)` is called repeatedly.
    """
    lossless, done = True, 0
    with ExitStack() as stack:
        train, held_out = (SplitWriter(folder, name, tokenizer.vocab_size, stack) for name in ("train", "held_out"))
        text_file = stack.enter_context((folder / HELD_OUT_TEXT).open("wb"))
        for batch in _batches(_in_pieces(documents, tokenizer)):
            for piece, ids in zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
                raw = utf8(piece.text)
                done += len(raw)
                (held_out if piece.held_out else train).append(ids, len(raw), piece.last)
                if piece.held_out:
                    text_file.write(raw)
                    lossless = lossless and tokenizer.decode(ids) == piece.text
            progress(train.n_documents + held_out.n_documents, done)
    n_tokens = train.n_tokens + held_out.n_tokens
    return Encoded(train.n_documents, held_out.n_documents, train.n_tokens, n_tokens, done, lossless)


class _Piece(NamedTuple):
    text: str
    held_out: bool
    last: bool  # the last piece of its document


def _batches(stream: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    size = 0
    for piece in stream:
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _in_pieces(documents: Iterable[tuple[str, bool]], tokenizer: Tokenizer) -> Iterator[_Piece]:
    for text, held_out in documents:
        parts = pieces(text, tokenizer)
        part = next(parts)
        for following in parts:
            yield _Piece(part, held_out, last=False)
            part = following
        if text:
            yield _Piece(part, held_out, last=True)


def pieces(text: str, tokenizer: Tokenizer, size: int = PIECE) -> Iterator[str]:
    """`text` in pieces of at most `size` characters whose concatenated ids equal those of the whole.

    A cut is accepted if the text around it has the same ids in two pieces as in one. Without such a cut nearby (a very
    long word) the piece is cut anyway, and byte-level ids still decode to the text.
    """
    start = 0
    while len(text) - start > size:
        stop = _find_cut(text, tokenizer, start, start + size)
        yield text[start:stop]
        start = stop
    yield text[start:]


def _find_cut(text: str, tokenizer: Tokenizer, start: int, stop: int) -> int:
    reach = max(start + 1, stop - 16 * _CONTEXT)
    candidates = [match.start() for match in _CUT.finditer(text, reach, stop)][-_CANDIDATES:]
    for cut in reversed(candidates):
        left, right = text[max(start, cut - _CONTEXT) : cut], text[cut : cut + _CONTEXT]
        if tokenizer.encode(left) + tokenizer.encode(right) == tokenizer.encode(left + right):
            return cut
    return stop


class SplitWriter:
    """Writes the three arrays of a split; `stack` closes their files."""

    def __init__(self, folder: Path, name: str, vocab_size: int, stack: ExitStack) -> None:
        def writer(part: str, dtype: object) -> ArrayWriter:
            return stack.enter_context(ArrayWriter(folder / f"{name}.{part}.npy", dtype))

        self._name = name
        self._tokens = writer("tokens", token_dtype(vocab_size))
        self._offsets = writer("offsets", np.int64)
        self._bytes = writer("bytes", np.int64)
        self._offsets.append([0])
        self._document_bytes = 0

    def append(self, ids: list[int] | np.ndarray, n_bytes: int, last: bool) -> None:
        """Append a piece of a document. last: it is the document's last piece."""
        self._tokens.append(ids)
        self._document_bytes += n_bytes
        if last:
            self._offsets.append([self._tokens.count])
            self._bytes.append([self._document_bytes])
            self._document_bytes = 0

    def extend(self, folder: Path) -> None:
        """Append all documents of the split with this name in another folder."""
        parts = ("tokens", "offsets", "bytes")
        tokens, offsets, n_bytes = (open_array(folder / f"{self._name}.{part}.npy") for part in parts)
        self._offsets.append(offsets[1:] + self._tokens.count)
        self._bytes.append(n_bytes)
        for start in range(0, len(tokens), _COPIED):
            self._tokens.append(tokens[start : start + _COPIED])

    @property
    def n_documents(self) -> int:
        return self._bytes.count

    @property
    def n_tokens(self) -> int:
        return self._tokens.count


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 or uint32, the smaller that holds every id of the vocabulary. DataError if neither does."""
    for dtype in _DTYPES:
        if vocab_size - 1 <= np.iinfo(dtype).max:
            return dtype
    raise DataError(f"a vocabulary of {vocab_size} is too large: shards hold ids below 2^32")


class ArrayWriter:
    """Appends to a one-dimensional .npy file, whose length is written to its header on exit."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        self.count = 0
        self._file: BinaryIO = path.open("wb")
        self._write_header()
        self._header_size = self._file.tell()

    def append(self, values: Any) -> None:
        """Append `values`. DataError for one that the file's dtype cannot hold."""
        array = np.asarray(values)
        if array.dtype != self.dtype:
            array = self._fitting(array.astype(np.int64))
        self._file.write(array.tobytes())
        self.count += len(array)

    def _fitting(self, array: np.ndarray) -> np.ndarray:
        """Integers converted to the file's dtype. DataError for one that it cannot hold."""
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
        # NumPy pads the header, so that a longer length fits in place
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
    """Memory-map a one-dimensional integer .npy. CorruptError for anything else, including pickled objects."""
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
    """The documents of one split, as ids without special tokens.

    tokens: all ids (memory-mapped). offsets: the begin of each document, and the end (n_documents + 1).
    byte_counts: the UTF-8 bytes of each document.
    """

    path: Path
    tokens: np.ndarray
    offsets: np.ndarray
    byte_counts: np.ndarray
    vocab_size: int

    @classmethod
    def open(cls, folder: Path, name: str, vocab_size: int) -> "Split":
        """Open the split `name` of a dataset's folder. CorruptError if its arrays do not match."""
        path = folder / f"{name}.tokens.npy"
        tokens = open_array(path)
        offsets_path = folder / f"{name}.offsets.npy"
        offsets, byte_counts = open_array(offsets_path), open_array(folder / f"{name}.bytes.npy")
        if tokens.dtype not in _DTYPES:
            raise CorruptError(f"{path}: needs uint16 or uint32, got {tokens.dtype}")
        if len(offsets) != len(byte_counts) + 1 or offsets[0] != 0 or offsets[-1] != len(tokens):
            raise CorruptError(f"{offsets_path}: does not match the tokens or byte counts; delete {folder}")
        if (np.diff(offsets) <= 0).any():
            raise CorruptError(f"{offsets_path}: offsets do not ascend; delete {folder}")
        return cls(path=path, tokens=tokens, offsets=offsets, byte_counts=byte_counts, vocab_size=vocab_size)

    @property
    def n_documents(self) -> int:
        return len(self.byte_counts)

    @property
    def n_tokens(self) -> int:
        """Ids without special tokens; each document has one more position to learn, its end."""
        return len(self.tokens)

    def counts(self) -> dict[str, int]:
        """Documents, bytes and tokens, of which each document has one more for its end."""
        return {"documents": self.n_documents, "bytes": self.n_bytes, "tokens": self.n_tokens + self.n_documents}

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
        """Raise CorruptError, naming shard and offset, if an id at these positions is outside of the vocabulary."""
        if len(ids) and ids.max() >= self.vocab_size:
            at = int(ids.argmax())
            raise CorruptError(
                f"{self.path}: offset {positions[at]}: token id {ids[at]} is outside of the vocabulary "
                f"(0 to {self.vocab_size - 1}); delete {self.path.parent} to prepare it again"
            )

    def verify(self) -> None:
        """Check all ids. CorruptError for one outside of the vocabulary."""
        for start in range(0, self.n_tokens, _SCANNED):
            ids = self.tokens[start : start + _SCANNED]
            self.require_known(ids, np.arange(start, start + len(ids)))


def join_splits(splits: list[Split]) -> Split:
    """The concatenated documents of all splits, in memory."""
    begins = np.cumsum([0, *(split.n_tokens for split in splits)])
    offsets = [split.offsets[:-1] + begin for split, begin in zip(splits, begins[:-1], strict=True)]
    return Split(
        path=splits[0].path,
        tokens=np.concatenate([split.tokens for split in splits]),
        offsets=np.concatenate([*offsets, begins[-1:]]),
        byte_counts=np.concatenate([split.byte_counts for split in splits]),
        vocab_size=splits[0].vocab_size,
    )
