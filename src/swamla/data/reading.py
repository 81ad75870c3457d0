"""Bytes of files, decompressed as they stream, and the text in them."""

import gzip
import io
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal, Protocol

from swamla.errors import DataError

COMPRESSED = (".gz", ".zst")
_CHUNK = 1 << 18


class File(Protocol):
    """A file to read from, here or on a hub: the part of `Path` that reading needs. Its text form names it."""

    @property
    def name(self) -> str: ...
    @property
    def stem(self) -> str: ...
    @property
    def suffix(self) -> str: ...
    def open(self, mode: Literal["rb"]) -> BinaryIO: ...


def open_bytes(path: File) -> BinaryIO:
    """A stream of the file's bytes, decompressed if its name ends in .gz or .zst."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(_GzipStream(path.open("rb")), _CHUNK)
    if suffix == ".zst":
        return io.BufferedReader(_ZstdStream(path.open("rb")), _CHUNK)
    return path.open("rb")


@contextmanager
def naming_damage(path: File) -> Iterator[None]:
    """Turn the many errors of unreadable or damaged files into one DataError that names the file."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: truncated or damaged ({error}); fetch or write the file again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def decode_utf8(data: bytes, where: object, invalid: str, notes: Counter[str], offset: int = 0) -> str:
    """The text in `data`, which begins `offset` bytes into `where`.

    Bytes that are not UTF-8 raise DataError with file and byte offset, or are replaced and counted in `notes`.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if invalid == "error":
            at, byte = offset + error.start, data[error.start]
            raise DataError(
                f"{where}: byte {at} (0x{byte:02x}) is not valid UTF-8; mend it, or replace such bytes with U+FFFD "
                f"by data.invalid_utf8=replace"
            ) from error
    text = data.decode("utf-8", errors="replace")
    notes["invalid UTF-8 sequences replaced"] += text.count("\ufffd") - data.count(b"\xef\xbf\xbd")
    return text


def mend_surrogates(text: str, where: object, invalid: str, notes: Counter[str]) -> str:
    """`text`, which came from JSON escapes, if it is Unicode; lone surrogates are treated as invalid UTF-8 is."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        if invalid == "error":
            code = ord(text[error.start])
            raise DataError(
                f"{where}: lone surrogate U+{code:04X} at character {error.start} of the text; mend it, or replace "
                f"such characters with U+FFFD by data.invalid_utf8=replace"
            ) from error
        lone = [c for c in text if 0xD800 <= ord(c) <= 0xDFFF]
        notes["invalid UTF-8 sequences replaced"] += len(lone)
        return text.translate({ord(c): "\ufffd" for c in lone})
    return text


class _GzipStream(gzip.GzipFile):
    """Gzip that closes the file below it, too."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(fileobj=file, mode="rb")
        self._below = file

    def close(self) -> None:
        super().close()
        self._below.close()


class _ZstdStream(io.RawIOBase):
    """Zstandard frames as a raw stream that, unlike the library's own, notices a truncated last frame."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._library = zstandard
        self._file = file
        self._frame: Any = None
        self._compressed = b""
        self._plain = memoryview(b"")  # slicing a view copies nothing, however much one chunk expands to

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, target: Any) -> int:
        while not self._plain:
            self._compressed = self._compressed or self._file.read(_CHUNK)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("zstandard data ended before the end of its frame")
                return 0
            self._plain = memoryview(self._decompress())
        count = min(len(target), len(self._plain))
        target[:count], self._plain = self._plain[:count], self._plain[count:]
        return count

    def _decompress(self) -> bytes:
        self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
        try:
            plain = self._frame.decompress(self._compressed)
        except self._library.ZstdError as error:
            raise EOFError(str(error)) from error
        self._compressed = b""
        if self._frame.eof:
            self._compressed, self._frame = self._frame.unused_data, None
        return plain
