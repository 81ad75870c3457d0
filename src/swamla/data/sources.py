"""Where text comes from: documents, read lazily, in an order that depends on nothing but their names."""

import hashlib
import io
import json
import os
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import NamedTuple

from swamla.data import hub
from swamla.data.config import DataConfig
from swamla.data.download import shakespeare
from swamla.data.notes import Notes
from swamla.data.reading import COMPRESSED, SNIFFED, File, naming_damage, not_text, open_bytes
from swamla.data.rows import RowRules, Span
from swamla.data.tables import READERS, NoRows, text_file
from swamla.data.walking import walk
from swamla.errors import DataError

NAMED_SOURCES = ("stdlib", "shakespeare")
_NOT_LIBRARY = frozenset({"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "__pycache__"})


class Entry(NamedTuple):
    """A file of a source. name: relative to the source, the same everywhere.  size: in bytes.

    state: what changes whenever the file does.
    """

    name: str
    file: File
    size: int
    state: tuple[str | int, ...]


FileReader = Callable[[Entry, Notes, Span | None], Iterator[str]]


@dataclass(frozen=True)
class Source:
    """Named files, and how to read documents from one of them.

    column: of rows, where their text is.  origin: where it all is from, for people; empty where the name tells that.
    left_out: what of a folder was not taken.
    """

    name: str
    entries: tuple[Entry, ...]
    read: FileReader
    column: str = ""
    origin: str = ""
    left_out: Notes = field(default_factory=Notes)

    def documents(self, notes: Notes) -> Iterator[str]:
        """All documents that hold text, in the order of the files' names; what was left out is counted in `notes`."""
        for entry in self.entries:
            yield from self.entry_documents(entry, notes)

    def entry_documents(self, entry: Entry, notes: Notes, span: Span | None = None) -> Iterator[str]:
        """The documents of one file, or of a span of it, that hold text."""
        for text in self.read(entry, notes, span):
            if text:
                yield text
            else:
                notes.add("empty documents skipped", entry.file)

    def state(self) -> list[list[str | int]]:
        """Every file's name and what changes whenever it does: when this is unchanged, so is the text."""
        return [[entry.name, *entry.state] for entry in self.entries]

    def digest(self) -> str:
        """A SHA-256 of `state`."""
        return hashlib.sha256(json.dumps(self.state()).encode("utf-8", "surrogateescape")).hexdigest()


def open_source(config: DataConfig, cache_dir: Path) -> Source:
    """The source that `config.source` names. DataError if there is no such thing, or nothing in it."""
    if config.source == "stdlib":
        return _stdlib()
    rules = RowRules(config.text_column, config.invalid_utf8, config.on_bad_row)
    read = partial(_read_file, rules=rules)
    if config.source == "shakespeare":
        path = shakespeare(cache_dir)
        return Source("shakespeare", (_entry(path.name, path),), read)
    if config.source.startswith(hub.PREFIX):
        return _from_hub(hub.list_dataset(config, cache_dir), config, partial(read, sniff=False))
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
    """The suffix that tells a file's kind, those of compression aside: ".jsonl" of "a.jsonl.zst"."""
    path = Path(name)
    return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSED else path.suffix.lower()


def _entry(name: str, path: Path) -> Entry:
    stat = path.stat()
    return Entry(name, path, stat.st_size, (str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))


def _from_path(path: Path, column: str, read: Callable[..., Iterator[str]]) -> Source:
    name = path.resolve().name or "root"
    if path.is_dir():
        left_out = Notes()
        entries = tuple(_entry(*found) for found in walk(path, left_out))
        if not entries:
            raise DataError(f"{path}: the folder holds no files{_but(left_out)}")
        return Source(name, entries, partial(read, in_folder=True), column, left_out=left_out)
    if not path.is_file():
        raise DataError(f"data.source = {str(path)!r}: no such file or folder{_suggestion(path)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes)")
    return Source(name, (_entry(path.name, path),), read, column)


def _suggestion(path: Path) -> str:
    close = get_close_matches(str(path), NAMED_SOURCES, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; give a path, or one of: {', '.join(NAMED_SOURCES)}"


def _but(left_out: Notes) -> str:
    return f" ({'; '.join(left_out.lines())})" if left_out.counts else ""


def _read_file(
    entry: Entry, notes: Notes, span: Span | None, *, rules: RowRules, in_folder: bool = False, sniff: bool = True
) -> Iterator[str]:
    """The texts of a file's rows, or all of a file that has none.

    in_folder: what is no text, or has no rows with that column, is left out; else it is an error.
    sniff: look at what the file holds; on a hub, its name is to be relied on.
    """
    head = _head(entry.file) if sniff else b""
    kind = ".parquet" if head.startswith(b"PAR1") else kind_of(entry.name)
    if kind != ".parquet" and (what := not_text(head)):
        if not in_folder:
            raise DataError(f"{entry.file}: is {what}")
        notes.add("files that are no text left out", f"{entry.file} is {re.split('[:(]', what)[0].strip()}")
        return
    try:
        yield from (READERS.get(kind) or text_file)(entry.file, rules, notes, span)
    except NoRows as error:
        if not in_folder:
            raise
        notes.add("files without such rows left out", error)
        return
    _take(entry, notes, span)


def _take(entry: Entry, notes: Notes, span: Span | None = None) -> None:
    """Count a file that was read, once however many spans it has."""
    if span is None or span[0] == 0:
        path = Path(entry.name)
        packed = path.suffix if path.suffix.lower() in COMPRESSED else ""
        notes.taken[kind_of(entry.name) + packed.lower() or "without a suffix"] += 1


def _head(file: File) -> bytes:
    with naming_damage(file), open_bytes(file) as stream:
        return stream.read(SNIFFED)


def _stdlib() -> Source:
    """The running Python's own library: its .py files, without tests, idle, lib2to3 and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted((path.relative_to(root).as_posix(), path) for path in _python_files(root))
    entries = tuple(_entry(*found) for found in paths)
    if not entries:
        raise DataError(f"{root}: this Python came without its library's source files; give data.source a path")
    return Source("stdlib", entries, _read_python)


def _python_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = (name for name in folders if name not in _NOT_LIBRARY)
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def _read_python(entry: Entry, notes: Notes, span: Span | None) -> Iterator[str]:
    """A Python file in the encoding that it declares (PEP 263)."""
    with naming_damage(entry.file), entry.file.open("rb") as stream:
        data = stream.read()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError):
        notes.add("undecodable Python files skipped", entry.file)
        return
    yield text
    _take(entry, notes)
