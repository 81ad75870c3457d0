"""Documents to shards: a stream of texts, long ones in pieces, encoded in batches that fill the cores."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from swamla.data.dataset import HELD_OUT_TEXT
from swamla.data.shards import ArrayWriter, token_dtype
from swamla.data.tokenizer import Tokenizer, utf8

Progress = Callable[[str, int, int], None]  # stage, documents done, bytes done

PIECE = 1 << 18  # characters; a library encoding needs some hundred bytes for each
_BATCH = 1 << 21
_CONTEXT = 256
_CANDIDATES = 16
_CUT = re.compile(r"(?<=\n)(?=\S)|(?<=\w)(?=[\n ])")


class _Piece(NamedTuple):
    text: str
    held_out: bool
    last: bool  # the document ends with it


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


def _in_pieces(documents: Iterable[tuple[str, bool]], tokenizer: Tokenizer) -> Iterator[_Piece]:
    for text, held_out in documents:
        parts = pieces(text, tokenizer)
        part = next(parts)
        for following in parts:
            yield _Piece(part, held_out, last=False)
            part = following
        if text:
            yield _Piece(part, held_out, last=True)


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


class _SplitWriter:
    """Writes the three arrays of a split."""

    def __init__(self, folder: Path, name: str, vocab_size: int, stack: ExitStack) -> None:
        def writer(part: str, dtype: object) -> ArrayWriter:
            return stack.enter_context(ArrayWriter(folder / f"{name}.{part}.npy", dtype))

        self._tokens = writer("tokens", token_dtype(vocab_size))
        self._offsets = writer("offsets", np.int64)
        self._bytes = writer("bytes", np.int64)
        self._offsets.append([0])
        self._document_bytes = 0

    def append(self, ids: list[int], n_bytes: int, last: bool) -> None:
        self._tokens.append(ids)
        self._document_bytes += n_bytes
        if last:
            self._offsets.append([self._tokens.count])
            self._bytes.append([self._document_bytes])
            self._document_bytes = 0

    @property
    def n_documents(self) -> int:
        return self._bytes.count

    @property
    def n_tokens(self) -> int:
        return self._tokens.count


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
        train, held_out = (_SplitWriter(folder, name, tokenizer.vocab_size, stack) for name in ("train", "held_out"))
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
