"""A source in units: stretches of text of some size, whose bounds depend on the input alone.

Whoever works on them, however many there are, the units are the same and so is what becomes of them.
"""

from collections.abc import Iterator
from typing import NamedTuple

from swamla.data.notes import Notes
from swamla.data.reading import COMPRESSED, is_plain
from swamla.data.rows import Span, parquet_group_sizes
from swamla.data.sources import Entry, Source, kind_of

UNIT_BYTES = 1 << 23
_EXPANSION = 4  # text is about so much larger than what compression makes of it


class Unit(NamedTuple):
    """Whole files first … stop - 1 of a source, or a span of the one file `first`."""

    first: int
    stop: int
    span: Span | None = None


def units_of(source: Source) -> list[Unit]:
    """The units of a source, in its order. DataError for a file that cannot be divided because it is damaged."""
    units: list[Unit] = []
    first, size = 0, 0
    for index, entry in enumerate(source.entries):
        spans = _spans(entry, source.column)
        if len(spans) > 1:
            if first < index:
                units.append(Unit(first, index))
            units += [Unit(index, index + 1, span) for span in spans]
            first, size = index + 1, 0
            continue
        size += entry.size * (_EXPANSION if _is_compressed(entry) else 1)
        if size >= UNIT_BYTES:
            units.append(Unit(first, index + 1))
            first, size = index + 1, 0
    if first < len(source.entries):
        units.append(Unit(first, len(source.entries)))
    return units


def unit_documents(source: Source, unit: Unit, notes: Notes) -> Iterator[str]:
    """The texts of a unit's documents, empty ones left out."""
    for entry in source.entries[unit.first : unit.stop]:
        yield from source.entry_documents(entry, notes, unit.span)


def describe_unit(source: Source, unit: Unit) -> str:
    """A unit's files, for messages."""
    entries = source.entries[unit.first : unit.stop]
    more = f" … {entries[-1].file}" if len(entries) > 1 else ""
    where = f" ({unit.span[0]} to {unit.span[1]})" if unit.span else ""
    return f"{entries[0].file}{more}{where}"


def _is_compressed(entry: Entry) -> bool:
    return entry.name.lower().endswith(COMPRESSED)


def _spans(entry: Entry, column: str) -> list[Span]:
    """Where a large file of rows is divided; nothing for one that is read as a whole."""
    if entry.size <= UNIT_BYTES or not is_plain(entry.file):
        return []
    kind = kind_of(entry.name)
    if kind == ".parquet":
        return _group_spans(parquet_group_sizes(entry.file, column))
    if kind in (".jsonl", ".ndjson"):
        return [(at, min(at + UNIT_BYTES, entry.size)) for at in range(0, entry.size, UNIT_BYTES)]
    return []


def _group_spans(sizes: list[int]) -> list[Span]:
    spans: list[Span] = []
    begin, size = 0, 0
    for group, bytes_of_group in enumerate(sizes):
        size += bytes_of_group
        if size >= UNIT_BYTES:
            spans.append((begin, group + 1))
            begin, size = group + 1, 0
    return [*spans, (begin, len(sizes))] if begin < len(sizes) else spans
