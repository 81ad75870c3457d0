"""Read files as streams of UTF-8, decompressed and transcoded; decode text; count what was left out."""

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, cast

import numpy as np

from swamla.errors import DataError

COMPRESSED = (".gz", ".gzip", ".zst", ".zstd", ".xz", ".bz2")
SNIFFED = 8192
_CHUNK = 1 << 18
_PLACES, _SHOWN = 5, 3  # places kept in meta.json, and displayed
_PACKED = {  # detected by content, since names are often wrong
    ".gz": re.compile(rb"\x1f\x8b\x08"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    ".xz": re.compile(rb"\xfd7zXZ\x00"),
    ".bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
}
_CONTROLS = bytes(
    {*range(32)} - {*b"\t\n\v\f\r\x1b"}
)  # half of the bytes of UTF-16 in many scripts, though valid UTF-8
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
}  # before UTF-16, since the marks of both begin alike
_MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_OTHERS = {
    rb"%PDF-": "a PDF: extract its text first, e.g. with pdftotext",
    rb"PK(\x03\x04|\x05\x06|\x07\x08)": "a zip archive (as docx, xlsx and epub are): unpack it, or export its text",
    rb"\xd0\xcf\x11\xe0": "an Office document: export its text first",
    rb"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07": "an archive: unpack it first",
    rb"(?s:.{257})ustar": "a tar archive: unpack it, and give the folder",
    rb"ARROW1|FEA1|\xff\xff\xff\xff": "an Arrow file: write it as parquet first",
    rb"\x89PNG|\xff\xd8\xff|\x7fELF": "an image or a program, not text",
    rb"\x93NUMPY|\x80[\x02-\x05]": "data of Python (.npy, a pickle), not text: write its texts to a file first",
    rb"\x04\x22\x4d\x18|\]\0\0": "compressed by lz4 or lzma: decompress it first",
    rb"SQLite format 3\0": "an SQLite database: export its table as csv first",
    rb"\{\\rtf": "an RTF document: export its text first",
    b"|".join(pattern.pattern for pattern in _PACKED.values()): "compressed more than once: decompress it first",
}


class Notes:
    """Counts of what was left out or changed.  places: the first few of each.  taken: files read, by suffix."""

    def __init__(self, plain: Mapping[str, Any] | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}
        self.taken: Counter[str] = Counter()
        if plain is not None:
            self.include(plain)

    def add(self, what: str, where: object = None, count: int = 1) -> None:
        """Count `what`; `where` is stored, converted by `str`, for the first few."""
        self.counts[what] += count
        if where is not None and len(self.places.get(what, ())) < _PLACES:
            self.places.setdefault(what, []).append(str(where))

    def include(self, plain: Mapping[str, Any]) -> None:
        """Add other notes, given as their `plain`; places already stored come first."""
        self.counts.update(plain["counts"])
        self.taken.update(plain["taken"])
        for what, places in plain["places"].items():
            self.places[what] = [*self.places.get(what, ()), *places][:_PLACES]

    def plain(self) -> dict[str, Any]:
        """As JSON data, in sorted order."""
        return {
            "counts": dict(sorted(self.counts.items())),
            "places": dict(sorted(self.places.items())),
            "taken": dict(sorted(self.taken.items())),
        }

    def lines(self) -> list[str]:
        """One line per kind of thing that was left out or changed."""
        return [f"{count} {what}{_named(self.places.get(what, []), count)}" for what, count in self.counts.items()]


def _named(places: list[str], count: int) -> str:
    more = " …" if count > _SHOWN else ""
    return f": {'; '.join(places[:_SHOWN])}{more}" if places else ""


class BadRow(Exception):
    """An unusable row or text file. where: its file and place, converted by `str` only if the error is displayed."""

    def __init__(self, where: object, what: str) -> None:
        super().__init__()
        self.where, self.what = where, what

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class File(Protocol):
    """A local file or one on a hub: the part of `Path` that reading needs. `str` of it is shown in messages."""

    @property
    def name(self) -> str: ...
    @property
    def stem(self) -> str: ...
    @property
    def suffix(self) -> str: ...
    def open(self, mode: Literal["rb"]) -> BinaryIO: ...


def open_bytes(path: File) -> BinaryIO:
    """A stream of the file's bytes, decompressed, and transcoded to UTF-8 if it has a UTF-16 or UTF-32 byte-order mark.

    Raises EOFError if the name has the suffix of a compression that the content does not have.
    """
    stream: Any = path.open("rb")
    head = stream.read(SNIFFED)
    stream.seek(0)
    packed = next((suffix for suffix, magic in _PACKED.items() if magic.match(head)), "")
    if packed:
        stream = _Unpacked(_UNPACKERS[packed](stream), stream)
        head = stream.peek(4)
    elif head and path.suffix.lower() in COMPRESSED:
        stream.close()
        raise EOFError(f"its content is not that of a {path.suffix} file")
    encoding = _encoding(head)
    return cast(BinaryIO, _Unpacked(_Recoded(stream, encoding), stream) if encoding else stream)


def is_plain(path: File) -> bool:
    """Whether the file is neither compressed nor UTF-16/32, so that offsets in it are offsets in its text.

    For a file on a hub decided by its name, to save a request.
    """
    if not isinstance(path, Path):
        return path.suffix.lower() not in COMPRESSED
    with path.open("rb") as stream:
        head = stream.read(SNIFFED)
    return not any(magic.match(head) for magic in _PACKED.values()) and not _encoding(head)


def not_text(head: bytes) -> str:
    """What a file that begins with `head` is, if it is certainly not text, and what to do with it; otherwise ""."""
    for pattern, what in _OTHERS.items():
        if re.match(pattern, head):
            return what
    if b"\0" in head and (_is_wide(head) or not _is_utf8(head)):
        encoding = _unmarked(head)
        hint = f" ({encoding} without a byte-order mark? convert it: iconv -f {encoding} -t UTF-8)" if encoding else ""
        return f"binary data, not text{hint}"
    return ""


def _encoding(head: bytes) -> str:
    return next((encoding for mark, encoding in _MARKS.items() if head.startswith(mark)), "")


def _unmarked(head: bytes) -> str:
    """The probable UTF-16 or UTF-32 encoding of `head`, told by which bytes of a character are small; else ""."""
    whole = np.frombuffer(head[: len(head) // 4 * 4], np.uint8).reshape(-1, 4)
    small = (whole < 0x20).sum(axis=0) > 0.7 * len(whole)
    wide = {(0, 1, 1, 1): "UTF-32LE", (1, 1, 1, 0): "UTF-32BE", (0, 1, 0, 1): "UTF-16LE", (1, 0, 1, 0): "UTF-16BE"}
    return wide.get(tuple(small.astype(int).tolist()), "")


def _is_wide(head: bytes) -> bool:
    """Whether `head` has as many control characters as binary numbers or UTF-16 have, which may be valid UTF-8.

    In UTF-16 one byte of a character is a control character in most alphabets. In the others, spaces and line ends give
    zero bytes, all at even or all at odd offsets.
    """
    controls = len(head) - len(head.translate(None, _CONTROLS))
    zeros = np.flatnonzero(np.frombuffer(head, np.uint8) == 0)
    of_one_kind = len(zeros) >= 8 and len(set(zeros % 2)) == 1
    return 10 * controls > len(head) or (of_one_kind and 50 * len(zeros) > len(head))


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # incremental, since the last character may be cut
    except UnicodeDecodeError:
        return False
    return True


@contextmanager
def naming_damage(path: File) -> Iterator[None]:
    """Turn all errors of unreadable or damaged files into a DataError that names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        # Errors of the system have an errno; those of libraries are about the content, except for a file on a hub.
        if isinstance(error, OSError) and (error.errno is not None or not isinstance(path, Path)):
            raise DataError(f"{path}: cannot be read ({error.strerror or line})") from error
        raise DataError(f"{path}: truncated or damaged ({line}); fetch or write the file again") from error


def decode_utf8(data: bytes, where: object, invalid: str, notes: Notes, offset: int = 0) -> str:
    """The text of `data`, which begins at byte `offset` of `where`.

    Invalid UTF-8 raises BadRow with the byte's offset, or is replaced and counted in `notes`.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if invalid == "error":
            at, byte = offset + error.start, data[error.start]
            raise BadRow(
                where,
                f"byte {at} (0x{byte:02x}) is not valid UTF-8; convert a file in another encoding (iconv -f latin1 -t "
                f'UTF-8), or replace such bytes with U+FFFD by invalid_utf8 = "replace"',
            ) from error
    text = data.decode("utf-8", errors="replace")
    notes.add("invalid UTF-8 sequences replaced", where, text.count("\ufffd") - data.count(b"\xef\xbf\xbd"))
    return text


def mend_surrogates(text: str, where: object, invalid: str, notes: Notes) -> str:
    """`text`, in which lone surrogates are treated like invalid UTF-8.

    They come from escapes in JSON, or represent bytes that were not UTF-8 (Python's "surrogateescape").
    """
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError as error:
        if invalid == "error":
            code = ord(text[error.start])
            byte = f"byte 0x{code & 0xFF:02x} that is not UTF-8, or " if 0xDC80 <= code <= 0xDCFF else ""
            what = f"{byte}lone surrogate U+{code:04X}"
            raise BadRow(
                where,
                f"{what} at character {error.start} of the text; mend it, or replace such characters with U+FFFD by "
                f'invalid_utf8 = "replace"',
            ) from error
    try:
        return decode_utf8(text.encode("utf-8", "surrogateescape"), where, invalid, notes)
    except UnicodeEncodeError:
        lone = [c for c in text if 0xD800 <= ord(c) <= 0xDFFF]
        notes.add("invalid UTF-8 sequences replaced", where, len(lone))
        return text.translate({ord(c): "\ufffd" for c in lone})


class _Unpacked(io.BufferedReader):
    """A buffered stream that also closes the file it reads from."""

    def __init__(self, stream: Any, below: Any) -> None:
        super().__init__(stream, _CHUNK)
        self._below = below

    def close(self) -> None:
        super().close()
        self._below.close()


class _Recoded(io.RawIOBase):
    """UTF-16 or UTF-32 transcoded to UTF-8, without byte-order mark; lone surrogates become invalid UTF-8."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)(errors="surrogatepass")
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        data = b"more"
        while data and not self._ready:
            data = self._file.read(_CHUNK)
            self._ready = self._decoder.decode(data, final=not data).encode("utf-8", "surrogatepass")
        count = min(len(target), len(self._ready))
        target[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


class _Frames(io.RawIOBase):
    """Concatenated compressed frames as one raw stream. EOFError for a truncated frame, and for data that is no frame.

    The libraries' own streams silently end at a truncated frame (zstandard), or at any data behind a whole frame (lzma,
    bz2).
    """

    def __init__(self, file: BinaryIO, begin: Callable[[], Any], errors: type[Exception], padding: bytes = b"") -> None:
        """begin: creates the decompressor of a frame.  padding: bytes that are allowed between frames."""
        self._file, self._begin, self._errors, self._padding = file, begin, errors, padding
        self._frame: Any = None
        self._packed = b""
        self._plain = memoryview(b"")  # slicing a view copies nothing, however large a chunk becomes

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._plain:
            self._packed = self._packed or self._file.read(_CHUNK)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("compressed data ended before the end of its frame")
                return 0
            self._plain = memoryview(self._decompressed())
        count = min(len(target), len(self._plain))
        target[:count], self._plain = self._plain[:count], self._plain[count:]
        return count

    def _decompressed(self) -> bytes:
        if self._frame is None:
            self._packed = self._packed.lstrip(self._padding) if self._padding else self._packed
            if not self._packed:
                return b""
            self._frame = self._begin()
        try:
            plain: bytes = self._frame.decompress(self._packed)
        except self._errors as error:
            raise EOFError(str(error)) from error
        self._packed = b""
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None
        return plain


def _zstd(file: BinaryIO) -> _Frames:
    import zstandard

    return _Frames(file, lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError)


_UNPACKERS: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    ".zst": _zstd,
    ".xz": lambda file: _Frames(file, lzma.LZMADecompressor, lzma.LZMAError, padding=b"\0"),
    ".bz2": lambda file: _Frames(file, bz2.BZ2Decompressor, OSError),
}
