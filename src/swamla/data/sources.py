"""Sources of text: a `Source` lists entries, such as files, and reads the documents of an entry.

`data.source` begins with the kind of a registered source ("stdlib", "hf:OWNER/NAME"), or is a path. A source is divided
into units of about 8 MB of text. Their bounds depend on the input alone, so the encoded tokens do not depend on the
number of workers.
"""

import hashlib
import io
import json
import os
import re
import sysconfig
import tokenize
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, cast

from swamla.data import hub
from swamla.data.config import CHAT, NAMES, TOKEN_IDS, DataConfig
from swamla.data.folders import walk
from swamla.data.reading import COMPRESSED, SNIFFED, Notes, is_plain, naming_damage, not_text, open_bytes
from swamla.data.rows import READERS, NoRows, RowRules, Span, begins_with_row, jsonl_rows, parquet_spans, text_file
from swamla.errors import DataError, require
from swamla.registry import Registered, members_of, register
from swamla.tasks import PREFIX

UNIT_BYTES = 1 << 23
EXPANSION = 4  # typical ratio of the size of text to its compressed size
TOKENIZERS = ("byte", "char", "gpt2", NAMES)  # that are no paths, whatever files there are
_NOT_LIBRARY = frozenset({"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "__pycache__"})


class Entry(NamedTuple):
    """A file of a source, or another piece that is read as a whole.

    name: relative to the source, independent of the machine.  file: what `Source.read` opens; `str` of it is shown in
    messages.  size: in bytes.  state: JSON data that changes whenever the text does.
    """

    name: str
    file: Any
    size: int
    state: tuple[str | int, ...]


class Unit(NamedTuple):
    """The entries first … stop - 1 of a source, or one span of the entry `first`."""

    first: int
    stop: int
    span: Span | None = None


@dataclass(frozen=True, kw_only=True)
class Source(Registered, home="swamla.data.sources"):
    """The entries of a source, and how to read their documents. It is pickled, and sent to the worker processes.

    alone: whether the kind alone names a source, as "stdlib" does; otherwise it is followed by a colon and more.
    name: of its folder in the cache.  entries: in the order of their documents.  origin: where the text is from, for
    display, if `data.source` does not say it.  left_out: files that were left out.
    """

    alone: ClassVar[bool] = True
    name: str = ""
    entries: tuple[Entry, ...] = ()
    origin: str = ""
    left_out: Notes = field(default_factory=Notes)

    @classmethod
    @abstractmethod
    def open(cls, text: str, config: DataConfig, cache_dir: Path) -> Self:
        """The source that `config.source` names. text: what follows the kind and the colon there.

        Raises DataError if the source is missing or empty, ConfigError for an invalid `text`.
        """

    @abstractmethod
    def read(self, entry: Entry, notes: Notes, span: Span | None = None) -> Iterator[str]:
        """The documents of an entry, or of one of its spans; counts in `notes` what it leaves out."""

    def spans(self, entry: Entry) -> list[Span]:
        """The spans into which a large entry is divided for `read`; empty for one that is read as a whole."""
        return []

    def last_span(self, entry: Entry, span: Span) -> Span:
        """The last span of an entry, extended to the entry's end if that has grown since it was divided."""
        return span

    def pinned(self, config: DataConfig) -> bool:
        """Whether processes that start at different times read the same text."""
        return True

    def units(self) -> list[Unit]:
        """The source divided into units, in order. DataError for a damaged file that cannot be divided."""
        units: list[Unit] = []
        first, size = 0, 0
        for index, entry in enumerate(self.entries):
            spans = self.spans(entry)
            if len(spans) > 1:
                if first < index:
                    units.append(Unit(first, index))
                units += [Unit(index, index + 1, span) for span in spans]
                first, size = index + 1, 0
                continue
            size += entry.size * (EXPANSION if entry.name.lower().endswith(COMPRESSED) else 1)
            if size >= UNIT_BYTES:
                units.append(Unit(first, index + 1))
                first, size = index + 1, 0
        if first < len(self.entries):
            units.append(Unit(first, len(self.entries)))
        return units

    def documents(self, notes: Notes) -> Iterator[str]:
        """All nonempty documents, in the order of the entries; counts in `notes` what is left out."""
        return self.unit_documents(Unit(0, len(self.entries)), notes)

    def unit_documents(self, unit: Unit, notes: Notes) -> Iterator[str]:
        """The nonempty documents of a unit; counts in `notes` what is left out."""
        for entry in self.entries[unit.first : unit.stop]:
            for text in self.read(entry, notes, unit.span):
                if text:
                    yield text
                else:
                    notes.add("empty documents skipped", f"one in {entry.file}")

    def describe_unit(self, unit: Unit) -> str:
        """A unit's files, for messages."""
        entries = self.entries[unit.first : unit.stop]
        more = f" … {entries[-1].file}" if len(entries) > 1 else ""
        where = f" ({unit.span[0]} to {unit.span[1]})" if unit.span else ""
        return f"{entries[0].file}{more}{where}"

    def state(self) -> list[list[str | int]]:
        """Name and state of every entry: if this is unchanged, so is the text."""
        return [[entry.name, *entry.state] for entry in self.entries]

    def digest(self) -> str:
        """A SHA-256 of `state`."""
        return hashlib.sha256(json.dumps(self.state()).encode("utf-8", "surrogateescape")).hexdigest()


def open_source(config: DataConfig, cache_dir: Path) -> Source:
    """The source that `config.source` names; raises as `Source.open` does."""
    return class_of(config.source).open(config.source.partition(":")[2], config, cache_dir)


def is_path(source: str) -> bool:
    """Whether a `data.source` is a path, after "files:" or alone."""
    return source != TOKEN_IDS and not source.startswith((PREFIX, CHAT)) and class_of(source) is Files


def class_of(source: str) -> type[Source]:
    """The class that a `data.source` names; `Files` if it names none."""
    kind, colon, _ = source.partition(":")
    cls = cast("type[Source] | None", members_of(Source).get(kind))
    return cls if cls is not None and (colon or cls.alone) else Files


@register
@dataclass(frozen=True, kw_only=True)
class StandardLibrary(Source):
    """Python's standard library: its .py files, without tests, idle, lib2to3 and installed packages."""

    kind: ClassVar[str] = "stdlib"

    @classmethod
    def open(cls, text: str, config: DataConfig, cache_dir: Path) -> Self:
        require(not text, "data.source", config.source, "must be stdlib")
        root = Path(sysconfig.get_path("stdlib"))
        found = []
        for folder, folders, files in os.walk(root):
            folders[:] = (name for name in folders if name not in _NOT_LIBRARY)
            found += [Path(folder, name) for name in files if name.endswith(".py")]
        if not found:
            raise DataError(f"{root}: has no source files of Python's standard library; give data.source a path")
        entries = sorted((path.relative_to(root).as_posix(), path) for path in found)
        return cls(name="stdlib", entries=tuple(_entry(*each) for each in entries))

    def read(self, entry: Entry, notes: Notes, span: Span | None = None) -> Iterator[str]:
        """The text of a Python file, in the encoding that it declares (PEP 263)."""
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


@register
@dataclass(frozen=True, kw_only=True)
class Files(Source):
    """A file, or all files of a folder.

    rules: for rows.  in_folder: leave out a file that is not text or lacks the text column, instead of raising.
    sniff: detect a file's kind by its first bytes, not its name alone; on a hub that would be a request per file.
    """

    kind: ClassVar[str] = "files"
    alone: ClassVar[bool] = False
    rules: RowRules = field(default_factory=RowRules)
    in_folder: bool = False
    sniff: bool = True

    @classmethod
    def open(cls, text: str, config: DataConfig, cache_dir: Path) -> Self:
        path, rules = Path(config.source.removeprefix(f"{cls.kind}:")).expanduser(), RowRules.of(config)
        if path.is_dir():
            left_out = Notes()
            entries = tuple(_entry(*found) for found in walk(path, left_out))
            if not entries:
                but = f" ({'; '.join(left_out.lines())})" if left_out.counts else ""
                raise DataError(f"{path}: the folder has no files{but}")
            name = path.resolve().name or "root"
            return cls(name=name, entries=entries, left_out=left_out, rules=rules, in_folder=True)
        if not path.is_file():
            there = os.path.lexists(path)
            what = "a broken link" if path.is_symlink() else "no file (a pipe or device? write it to a file first)"
            if there:
                raise DataError(f"data.source = {str(path)!r}: is {what}")
            raise DataError(f"data.source = {str(path)!r}: no such file or folder{_suggestion(str(path))}")
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty (0 bytes)")
        return cls(name=path.resolve().name, entries=(_entry(path.name, path),), rules=rules)

    def read(self, entry: Entry, notes: Notes, span: Span | None = None) -> Iterator[str]:
        """The texts of a file's rows, or the whole file as one text."""
        head = b""
        if self.sniff:
            with naming_damage(entry.file), open_bytes(entry.file) as stream:
                head = stream.read(SNIFFED)
        suffix = ".parquet" if head.startswith(b"PAR1") else suffix_of(entry.name)
        if suffix != ".parquet" and (what := not_text(head)):
            if not self.in_folder:
                raise DataError(f"{entry.file}: is {what}")
            notes.add("files that are not text left out", f"{entry.file} is {re.split('[:(]', what)[0].strip()}")
            return
        if suffix not in READERS and begins_with_row(head, self.rules.column):
            notes.add("files of JSON lines taken for one text each by their names (rows are of .jsonl)", entry.name)
        try:
            yield from READERS.get(suffix, text_file)(entry.file, self.rules, notes, span)
        except NoRows as error:
            if not self.in_folder:
                raise
            notes.add("files without such rows left out", error)
            return
        _take(entry, notes, span)

    def spans(self, entry: Entry) -> list[Span]:
        """Byte ranges of a large .jsonl file, row groups of a .parquet file; other files are not divided."""
        suffix = suffix_of(entry.name)
        divided = suffix == ".parquet" or READERS.get(suffix) is jsonl_rows
        if entry.size <= UNIT_BYTES or not divided or not is_plain(entry.file):
            return []
        if suffix == ".parquet":
            return parquet_spans(entry.file, self.rules.column, UNIT_BYTES)
        return [(at, min(at + UNIT_BYTES, entry.size)) for at in range(0, entry.size, UNIT_BYTES)]

    def last_span(self, entry: Entry, span: Span) -> Span:
        """Extended to the end of a .jsonl file; a .parquet file does not grow."""
        return span if suffix_of(entry.name) == ".parquet" else (span[0], max(span[1], entry.size))


@register
@dataclass(frozen=True, kw_only=True)
class Hub(Files):
    """A dataset on the Hugging Face hub: hf:OWNER/NAME."""

    kind: ClassVar[str] = "hf"

    @classmethod
    def open(cls, text: str, config: DataConfig, cache_dir: Path) -> Self:
        listing = hub.list_dataset(config, cache_dir)
        entries = tuple(
            Entry(path, hub.HubFile(listing.repo, listing.commit, path, size), size, (listing.repo, size, content))
            for path, size, content in listing.files
        )
        which = f"config {config.hub_config or 'default'}, split {config.hub_split}"
        origin = f"{config.source} ({which}, commit {listing.commit})"
        name = listing.repo.rpartition("/")[2]
        return cls(name=name, entries=entries, origin=origin, rules=RowRules.of(config), sniff=False)

    def pinned(self, config: DataConfig) -> bool:
        """True for a commit; a branch changes."""
        return hub.is_commit(config.hub_revision)


@register
@dataclass(frozen=True, kw_only=True)
class Shakespeare(Files):
    """Tiny Shakespeare, downloaded once."""

    kind: ClassVar[str] = "shakespeare"
    alone: ClassVar[bool] = True

    @classmethod
    def open(cls, text: str, config: DataConfig, cache_dir: Path) -> Self:
        require(not text, "data.source", config.source, "must be shakespeare")
        path = hub.shakespeare(cache_dir)
        return cls(name="shakespeare", entries=(_entry(path.name, path),), rules=RowRules.of(config))


def located(data: DataConfig) -> DataConfig:
    """Make the data's paths absolute, so that a run can be resumed and evaluated from any folder."""

    def of(source: str) -> str:
        prefix = CHAT if source.startswith(CHAT) else "files:"
        return _absolute(source, prefix) if prefix == CHAT or is_path(source) else source

    return replace(
        data,
        source=of(data.source),
        mixture=tuple(replace(part, source=of(part.source)) for part in data.mixture),
        tokenizer=data.tokenizer if data.tokenizer in TOKENIZERS else _absolute(data.tokenizer, "gpt2:"),
        cache_dir=data.cache_dir and str(Path(data.cache_dir).expanduser().resolve()),
    )


def split_kind(path: str, prefix: str) -> tuple[str, str]:
    """The prefix, or "" if the path does not begin with it, and the rest."""
    return (prefix, path.removeprefix(prefix)) if path.startswith(prefix) else ("", path)


def _absolute(path: str, prefix: str) -> str:
    """The absolute path, behind `prefix` if it had that; unchanged if it does not exist, for the error message."""
    kind, rest = split_kind(path, prefix)
    found = Path(rest).expanduser()
    return kind + str(found.resolve()) if found.exists() else path


def suffix_of(name: str) -> str:
    """The lower-case suffix of a file's kind, without that of its compression: ".jsonl" for "a.jsonl.zst"."""
    path = Path(name)
    return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSED else path.suffix.lower()


def _entry(name: str, path: Path) -> Entry:
    stat = path.stat()
    return Entry(name, path, stat.st_size, (str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))


def _suggestion(source: str) -> str:
    kinds = {kind: cast("type[Source]", cls) for kind, cls in members_of(Source).items()}
    known = [kind for kind, cls in kinds.items() if cls.alone]
    if close := get_close_matches(source, known, n=1):
        return f"; did you mean {close[0]!r}?"
    plugin = "; or of a plugin: --plugin FILE" if source.partition(":")[0].isidentifier() else ""
    more = [f"{kind}:…" for kind, cls in kinds.items() if not cls.alone and kind != "files"]
    return f"; give a path, or one of: {', '.join([*known, *more])}{plugin}"


def _take(entry: Entry, notes: Notes, span: Span | None = None) -> None:
    """Count a file that was read; one with several spans is counted once, with its first."""
    if span is None or span[0] == 0:
        path = Path(entry.name)
        packed = path.suffix if path.suffix.lower() in COMPRESSED else ""
        notes.taken[suffix_of(entry.name) + packed.lower() or "without a suffix"] += 1
