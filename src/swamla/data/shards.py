"""Documents to shards and back: held out or not, encoded in pieces, written, and memory-mapped as a `Split`.

A split is three .npy files: `NAME.tokens.npy`, the ids of all documents without specials; `NAME.offsets.npy`, where
each document begins, and the end; `NAME.bytes.npy`, the UTF-8 bytes of each. What is held out is kept as text, too.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from swamla.data.tokenizer import Tokenizer, utf8
from swamla.errors import CorruptError, DataError

Progress = Callable[[str, int, int], None]  # stage, documents done, bytes done

HELD_OUT_TEXT = "held_out.txt"
PIECE = 1 << 18  # characters; a library encoding needs some hundred bytes for each
_BATCH = 1 << 21
_CONTEXT = 256
_CANDIDATES = 16
_CUT = re.compile(r"(?<=\n)(?=\S)|(?<=\w)(?=[\n ])")
_DTYPES = (np.dtype(np.uint16), np.dtype(np.uint32))
_SCANNED = _COPIED = 1 << 24


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out `fraction` of all documents.

    The first 8 bytes of the SHA-256 of its text decide. The same text is on the same side whatever file, row, name or
    compression it comes in; a byte-order mark and the kind of its line ends do not count.
    """
    identity = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    digest = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def divide(documents: Iterable[str], fraction: float) -> tuple[str, Iterator[tuple[str, bool]]]:
    """How the split is made, in words, and (text, held out?) for each document.

    A document that is the only one is cut, and its last characters are the held-out document.
    """
    remaining = iter(documents)
    first = list(islice(remaining, 2))
    if len(first) == 1 and fraction < 1:
        return f"the last {100 * fraction:g} % of the only document's characters", _cut(first[0], fraction)
    return rule_for_many(fraction), ((text, is_held_out(text, fraction)) for text in chain(first, remaining))


def rule_for_many(fraction: float) -> str:
    """How more than one document are split, in words."""
    return "all of it" if fraction == 1 else f"{100 * fraction:g} % of documents, by a hash of their text"


def _cut(text: str, fraction: float) -> Iterator[tuple[str, bool]]:
    """The two parts of a text, cut after the same word whatever its line ends are."""
    pairs = [match.start() for match in re.finditer("\r\n", text)]
    kept = int((len(text) - len(pairs)) * (1 - fraction))  # characters, a line's end counted as one
    at = kept + sum(1 for earlier, place in enumerate(pairs) if place - earlier < kept)
    yield text[:at], False
    yield text[at:], True


class Encoded(NamedTuple):
    """Documents of each split, tokens of one and of both, bytes; whether what is held out decodes to its text."""

    train: int
    held_out: int
    train_tokens: int
    tokens: int
    bytes: int
    lossless: bool


def encode_documents(
    documents: Iterable[tuple[str, bool]], tokenizer: Tokenizer, folder: Path, progress: Progress
) -> Encoded:
    """Write the shards and the held-out text of (text, held out?) pairs into `folder`."""
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
            progress("encoding", train.n_documents + held_out.n_documents, done)
    n_tokens = train.n_tokens + held_out.n_tokens
    return Encoded(train.n_documents, held_out.n_documents, train.n_tokens, n_tokens, done, lossless)


class _Piece(NamedTuple):
    text: str
    held_out: bool
    last: bool  # the document ends with it


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
    """`text` in parts of at most `size` characters whose ids, one behind the other, are those of the whole.

    A part ends where the tokenizer gives the text around the cut the same ids in two parts as in one. Where there is
    no such place in reach (a line of one endless word), it ends anyway: byte-level ids still decode to the text.
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
    """Writes the three arrays of a split, which `stack` closes."""

    def __init__(self, folder: Path, name: str, vocab_size: int, stack: ExitStack) -> None:
        def writer(part: str, dtype: object) -> ArrayWriter:
            return stack.enter_context(ArrayWriter(folder / f"{name}.{part}.npy", dtype))

        self._name = name
        self._tokens = writer("tokens", token_dtype(vocab_size))
        self._offsets = writer("offsets", np.int64)
        self._bytes = writer("bytes", np.int64)
        self._offsets.append([0])
        self._document_bytes = 0

    def append(self, ids: list[int], n_bytes: int, last: bool) -> None:
        """A piece of a document; last: the document ends with it."""
        self._tokens.append(ids)
        self._document_bytes += n_bytes
        if last:
            self._offsets.append([self._tokens.count])
            self._bytes.append([self._document_bytes])
            self._document_bytes = 0

    def extend(self, folder: Path) -> None:
        """All documents of the split of this name in another folder."""
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


def join_splits(splits: list[Split]) -> Split:
    """The documents of all splits, one behind the other, in memory."""
    begins = np.cumsum([0, *(split.n_tokens for split in splits)])
    offsets = [split.offsets[:-1] + begin for split, begin in zip(splits, begins[:-1], strict=True)]
    return Split(
        path=splits[0].path,
        tokens=np.concatenate([split.tokens for split in splits]),
        offsets=np.concatenate([*offsets, begins[-1:]]),
        byte_counts=np.concatenate([split.byte_counts for split in splits]),
        vocab_size=splits[0].vocab_size,
    )


def documents_shared(tested: Split, trained: Split, tokenizer: Tokenizer) -> int:
    """How many documents of `tested` are in `trained` too, line ends aside; both made with `tokenizer`."""
    wanted = [_with_other_line_ends(tested.document(index), tokenizer) for index in range(tested.n_documents)]
    lengths = sorted({len(ids) for alike in wanted for ids in alike})
    possible = np.flatnonzero(np.isin(trained.lengths, lengths))  # others need not be read
    known = {_digest(trained.document(int(index))) for index in possible}
    return sum(any(_digest(ids) in known for ids in alike) for alike in wanted)


def _with_other_line_ends(ids: np.ndarray, tokenizer: Tokenizer) -> list[np.ndarray]:
    """A document as it is and, where it has lines, with the ends of Unix and of Windows."""
    text = tokenizer.decode(ids.tolist())
    unix = text.replace("\r\n", "\n").replace("\r", "\n")
    others = {unix, unix.replace("\n", "\r\n")} - {text} if "\n" in unix else set()
    found = [ids]
    for other in sorted(others):
        with suppress(DataError):  # of a vocabulary of characters that has no such line end
            found.append(np.array(tokenizer.encode(other)))
    return found


def _digest(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(ids.astype(np.uint32).tobytes(), digest_size=16).digest()
