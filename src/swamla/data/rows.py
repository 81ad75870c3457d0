"""Texts of the rows of jsonl and parquet files, streamed, of the whole file or of one of its spans.

A span is a stretch of a file that can be read without what stands before it: byte offsets [begin, end) of a jsonl
file, of which it has the lines that begin there; numbers of row groups of a parquet file. Spans one behind the other
hold each row once, wherever they were cut.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from swamla.data.foreign import foreign
from swamla.data.notes import Notes
from swamla.data.reading import BadRow, File, decode_utf8, is_plain, mend_surrogates, naming_damage, open_bytes
from swamla.errors import DataError

Span = tuple[int, int]

_PARQUET_ROWS = 256  # rows decoded at once: they may be long
_SKIPPED = 1 << 20  # bytes of a line that another span has, dropped at once


@dataclass(frozen=True)
class RowRules:
    """column: where rows have their text.  invalid, on_bad_row: `DataConfig.invalid_utf8` and `.on_bad_row`."""

    column: str
    invalid: str
    on_bad_row: str

    def judge(self, bad: BadRow, notes: Notes) -> None:
        """Leave the row out and count it, where that was asked for; else raise DataError."""
        if self.on_bad_row == "stop":
            raise DataError(f"{bad} (or leave such rows out: --on_bad_row skip)") from bad.__cause__
        notes.add("bad rows skipped", bad)


class _Line:
    """A line by its offset; its number, where it is not known, is only counted when an error is to name it."""

    def __init__(self, path: File, offset: int, number: int = 0) -> None:
        self.path, self.offset, self.number = path, offset, number

    def __str__(self) -> str:
        if not self.number:
            self.number, left = 1, self.offset
            with open_bytes(self.path) as stream:
                while left > 0 and (chunk := stream.read(min(left, _SKIPPED))):
                    self.number, left = self.number + chunk.count(b"\n"), left - len(chunk)
        return f"{self.path}: line {self.number}"


def jsonl_rows(path: File, rules: RowRules, notes: Notes, span: Span | None = None) -> Iterator[str]:
    """Each line's text; blank lines are no rows. DataError names file and line of what is not as it should.

    span: byte offsets; a line belongs to the span in which it begins.
    """
    with naming_damage(path), open_bytes(path) as lines:
        offset = _first_line(lines, *span) if span else 0
        number = 0 if span and span[0] else 1  # of the line, where lines are counted from the first
        while (span is None or offset < span[1]) and (line := lines.readline()):
            size = len(line)
            where: object = _Line(path, offset, number)
            if not number and rules.on_bad_row == "skip":  # counting would read the file once more for each of many
                where = f"{path}: the line at byte {offset}"
            try:
                text = "" if line.isspace() else decode_utf8(line, path, rules.invalid, notes, offset)
                blank = not text
                del line  # a long one is not kept while its text is worked on
                if not blank:
                    text = mend_surrogates(
                        row_text(_parsed(text, where), rules.column, where), where, rules.invalid, notes
                    )
            except BadRow as bad:
                rules.judge(bad, notes)
            else:
                if not blank:
                    yield text
            offset, number = offset + size, number and number + 1


def _first_line(lines: BinaryIO, begin: int, end: int) -> int:
    """Where the first line that does not begin before `begin` does; the stream stands there, unless that is >= end."""
    if begin == 0:
        return 0
    offset = lines.seek(begin - 1)
    while offset < end:
        part = lines.readline(_SKIPPED)
        offset += len(part)
        if not part or part.endswith(b"\n"):
            break
    return offset


def _parsed(line: str, where: object) -> Any:
    try:
        return json.loads(line.lstrip("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise BadRow(where, f"not JSON ({error})") from error


def row_text(row: Any, column: str, where: object) -> str:
    """The text in a row that JSON gave. BadRow if it is no object, or has no text there."""
    if not isinstance(row, dict):
        raise BadRow(where, f'needs an object such as {{"{column}": "…"}}, got {type(row).__name__}')
    if column not in row:
        raise BadRow(where, no_column(column, list(row)))
    if not isinstance(row[column], str):
        raise BadRow(where, f"column {column!r} needs text, got {type(row[column]).__name__}")
    return row[column]


def no_column(column: str, columns: list[str]) -> str:
    """That there is no such column, which there are, and how to say which is meant."""
    names = [" ".join(name.encode("utf-8", "replace").decode().split())[:40] for name in columns[:20]]
    some = ", ".join(names) + (f" … ({len(columns)} in all)" if len(columns) > 20 else "")
    return f"no column {column!r}; it has {some or 'none'} (choose by --text_column)"


def parquet_rows(path: File, rules: RowRules, notes: Notes, span: Span | None = None) -> Iterator[str]:
    """Each row's text, a few rows in memory at a time; a null is an empty text. span: row groups."""
    with _parquet(path) as file:
        _require_text_column(file.schema_arrow, path, rules.column)
        groups = range(*span) if span else range(file.num_row_groups)
        if groups.stop > file.num_row_groups:
            raise DataError(f"{path}: has {file.num_row_groups} row groups, {groups.stop} before; restore the file")
        row = sum(file.metadata.row_group(group).num_rows for group in range(groups.start))
        for raw in _parquet_bytes(file, rules.column, groups):
            try:
                text = decode_utf8(raw, f"{path}: row {row}", rules.invalid, notes)
            except BadRow as bad:
                rules.judge(bad, notes)
            else:
                yield text
            row += 1


def parquet_group_sizes(path: File, column: str) -> list[int]:
    """The uncompressed bytes of each row group's texts. DataError for a file that has no such column."""
    with _parquet(path) as file:
        _require_text_column(file.schema_arrow, path, column)
        sizes = []
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            columns = (group.column(i) for i in range(group.num_columns))
            sizes.append(sum(c.total_uncompressed_size for c in columns if c.path_in_schema == column))
        return sizes


@contextmanager
def _parquet(path: File) -> Iterator[Any]:
    """A parquet file, closed in the end; what is wrong with it becomes a DataError that names it."""
    damaged = f"{path}: truncated or damaged parquet"
    with naming_damage(path), foreign(DataError, damaged), _open_parquet(path) as file:
        yield file


def _open_parquet(path: File) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not is_plain(path):
        with open_bytes(path) as stream:
            return pq.ParquetFile(pa.BufferReader(stream.read()))
    if isinstance(path, Path):
        return pq.ParquetFile(path, memory_map=True)
    return pq.ParquetFile(path.open("rb"), pre_buffer=True)


def _require_text_column(schema: Any, path: File, column: str) -> None:
    import pyarrow as pa

    if column not in schema.names:
        raise DataError(f"{path}: {no_column(column, schema.names)}")
    kind = schema.field(column).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(is_text(value) for is_text in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
        raise DataError(f"{path}: column {column!r} needs text, got {kind}")


def _parquet_bytes(file: Any, column: str, groups: range) -> Iterator[bytes]:
    """The column's values as bytes: Arrow does not promise that its strings are UTF-8."""
    import pyarrow as pa

    for batch in file.iter_batches(batch_size=_PARQUET_ROWS, row_groups=list(groups), columns=[column]):
        for raw in batch.column(0).cast(pa.large_binary()).to_pylist():
            yield raw or b""
