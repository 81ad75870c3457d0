"""Where text comes from: documents, read lazily, in an order that depends on nothing but their names."""

import io
import os
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import NamedTuple

from swamla.data import hub
from swamla.data.config import DataConfig
from swamla.data.download import shakespeare
from swamla.data.reading import COMPRESSED, File, decode_utf8, naming_damage, open_bytes
from swamla.data.rows import Span, jsonl_rows, parquet_rows
from swamla.errors import DataError

NAMED_SOURCES = ("stdlib", "shakespeare")
_ROW_READERS = {".jsonl": jsonl_rows, ".ndjson": jsonl_rows, ".parquet": parquet_rows}
_SNIFFED = 8192  # a NUL among a file's first bytes marks it as binary, as git has it
_NOT_LIBRARY = frozenset({"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "__pycache__"})


class Entry(NamedTuple):
    """A file of a source. name: relative to the source, the same everywhere.  size: in bytes.

    state: what changes whenever the file does.
    """

    name: str
    file: File
    size: int
    state: tuple[str | int, ...]


FileReader = Callable[[Entry, Counter[str], Span | None], Iterator[str]]


@dataclass(frozen=True)
class Source:
    """Named files, and how to read documents from one of them.

    column: of rows, where their text is.  origin: where it all is from, for people; empty where the name tells that.
    """

    name: str
    entries: tuple[Entry, ...]
    read: FileReader
    column: str = ""
    origin: str = ""

    def documents(self, notes: Counter[str]) -> Iterator[str]:
        """All documents that hold text, in the order of the files' names; what was left out is counted in `notes`."""
        for entry in self.entries:
            yield from self.entry_documents(entry, notes)

    def entry_documents(self, entry: Entry, notes: Counter[str], span: Span | None = None) -> Iterator[str]:
        """The documents of one file, or of a span of it, that hold text."""
        for text in self.read(entry, notes, span):
            if text:
                yield text
            else:
                notes["empty documents skipped"] += 1

    def state(self) -> list[list[str | int]]:
        """Every file's name and what changes whenever it does: when this is unchanged, so is the text."""
        return [[entry.name, *entry.state] for entry in self.entries]


def open_source(config: DataConfig, cache_dir: Path) -> Source:
    """The source that `config.source` names. DataError if there is no such thing, or nothing in it."""
    if config.source == "stdlib":
        return _stdlib()
    read = partial(_read_file, column=config.text_column, invalid=config.invalid_utf8)
    if config.source == "shakespeare":
        path = shakespeare(cache_dir)
        return Source("shakespeare", (_entry(path.name, path),), read)
    if config.source.startswith(hub.PREFIX):
        return _from_hub(hub.list_dataset(config, cache_dir), config, partial(read, json_rows=True))
    return _from_path(Path(config.source).expanduser(), config.text_column, read)


def _from_hub(listing: hub.HubListing, config: DataConfig, read: FileReader) -> Source:
    entries = tuple(
        Entry(path, hub.HubFile(listing.repo, listing.commit, path, size), size, (listing.repo, size, content))
        for path, size, content in listing.files
    )
    which = f"config {config.hub_config or 'default'}, split {config.hub_split}"
    origin = f"{config.source} ({which}, commit {listing.commit})"
    return Source(listing.repo.rpartition("/")[2], entries, read, config.text_column, origin)


def kind_of(name: str) -> str:
    """The suffix that tells a file's kind, .gz and .zst aside: ".jsonl" of "a.jsonl.zst"."""
    path = Path(name)
    return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSED else path.suffix.lower()


def _entry(name: str, path: Path) -> Entry:
    stat = path.stat()
    return Entry(name, path, stat.st_size, (str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))


def _from_path(path: Path, column: str, read: Callable[..., Iterator[str]]) -> Source:
    name = path.resolve().name or "root"
    if path.is_dir():
        entries = tuple(_entry(*found) for found in _walk(path, keep=lambda part: not part.startswith(".")))
        if not entries:
            raise DataError(f"{path}: the folder holds no files (hidden ones do not count)")
        return Source(name, entries, partial(read, skip_binary=True), column)
    if not path.is_file():
        raise DataError(f"data.source = {str(path)!r}: no such file or folder{_suggestion(path)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes)")
    return Source(name, (_entry(path.name, path),), read, column)


def _suggestion(path: Path) -> str:
    close = get_close_matches(str(path), NAMED_SOURCES, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; give a path, or one of: {', '.join(NAMED_SOURCES)}"


def _walk(root: Path, keep: Callable[[str], bool]) -> list[tuple[str, Path]]:
    """(name relative to `root`, path) of every file under `root`, of folders and files that `keep` accepts, sorted."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = filter(keep, folders)
        paths = (Path(folder, file) for file in files if keep(file))
        found += [(path.relative_to(root).as_posix(), path) for path in paths if path.is_file()]
    return sorted(found)


def _read_file(
    entry: Entry,
    notes: Counter[str],
    span: Span | None,
    *,
    column: str,
    invalid: str,
    skip_binary: bool = False,
    json_rows: bool = False,
) -> Iterator[str]:
    """The rows of a jsonl or parquet file as documents, or any other file as one.

    json_rows: a .json file has rows, too: on the hub many are called so.
    """
    kind = kind_of(entry.name)
    kind = ".jsonl" if json_rows and kind == ".json" else kind
    if kind in _ROW_READERS:
        yield from _ROW_READERS[kind](entry.file, column, invalid, notes, span)
        return
    with naming_damage(entry.file), open_bytes(entry.file) as stream:
        head = stream.read(_SNIFFED)
        if skip_binary and b"\0" in head:
            notes["binary files skipped"] += 1
            return
        data = head + stream.read()
    yield decode_utf8(data, entry.file, invalid, notes).removeprefix("\ufeff")  # a mark of the file, not its text


def _stdlib() -> Source:
    """The running Python's own library: its .py files, without tests, idle, lib2to3 and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    found = _walk(root, lambda part: part not in _NOT_LIBRARY)
    entries = tuple(_entry(name, path) for name, path in found if path.suffix == ".py")
    if not entries:
        raise DataError(f"{root}: this Python came without its library's source files; give data.source a path")
    return Source("stdlib", entries, _read_python)


def _read_python(entry: Entry, notes: Counter[str], span: Span | None) -> Iterator[str]:
    """A Python file in the encoding that it declares (PEP 263)."""
    with naming_damage(entry.file), entry.file.open("rb") as stream:
        data = stream.read()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError):
        notes["undecodable Python files skipped"] += 1
        return
    yield text
