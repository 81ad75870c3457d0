"""Texts of the rows of jsonl and parquet files, streamed, of the whole file or of one of its spans.

A span is a stretch of a file that can be read without what stands before it: byte offsets [begin, end) of a jsonl
file, of which it has the lines that begin there; numbers of row groups of a parquet file. Spans one behind the other
hold each row once, wherever they were cut.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from swamla.data.reading import COMPRESSED, File, decode_utf8, mend_surrogates, naming_damage, open_bytes
from swamla.errors import DataError

Span = tuple[int, int]

_PARQUET_ROWS = 256  # rows decoded at once: they may be long
_SKIPPED = 1 << 20  # bytes of a line that another span has, dropped at once


class _Line:
    """A line by its offset; its number is only counted when an error is to name it."""

    def __init__(self, path: File, offset: int) -> None:
        self.path, self.offset = path, offset

    def __str__(self) -> str:
        number, left = 1, self.offset
        with open_bytes(self.path) as stream:
            while left > 0 and (chunk := stream.read(min(left, _SKIPPED))):
                number, left = number + chunk.count(b"\n"), left - len(chunk)
        return f"{self.path}: line {number}"


def jsonl_rows(path: File, column: str, invalid: str, notes: Counter[str], span: Span | None = None) -> Iterator[str]:
    """Each line's text; blank lines are no rows. DataError names file and line of what is not as it should.

    span: byte offsets; a line belongs to the span in which it begins.
    """
    with naming_damage(path), open_bytes(path) as lines:
        offset = _first_line(lines, *span) if span else 0
        while (span is None or offset < span[1]) and (line := lines.readline()):
            size, where = len(line), _Line(path, offset)
            if not line.isspace():
                text = _json_text(decode_utf8(line, path, invalid, notes, offset), column, where)
                del line  # a long one is not kept while its text is worked on
                yield mend_surrogates(text, where, invalid, notes)
            offset += size


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


def _json_text(line: str, column: str, where: object) -> str:
    try:
        row = json.loads(line.lstrip("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f'{where}: needs an object such as {{"{column}": "…"}}, got {type(row).__name__}')
    if column not in row:
        raise DataError(_no_column(where, column, list(row)))
    if not isinstance(row[column], str):
        raise DataError(f"{where}: column {column!r} needs text, got {type(row[column]).__name__}")
    return row[column]


def _no_column(where: object, column: str, columns: list[str]) -> str:
    return f"{where}: no column {column!r}; it has {', '.join(columns) or 'none'} (choose by data.text_column)"


def parquet_rows(path: File, column: str, invalid: str, notes: Counter[str], span: Span | None = None) -> Iterator[str]:
    """Each row's text, a few rows in memory at a time; a null is an empty text. span: row groups."""
    with _parquet(path) as file:
        _require_text_column(file.schema_arrow, path, column)
        groups = range(*span) if span else range(file.num_row_groups)
        row = sum(file.metadata.row_group(group).num_rows for group in range(groups.start))
        for raw in _parquet_bytes(file, column, groups):
            yield decode_utf8(raw, f"{path}: row {row}", invalid, notes)
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
    import pyarrow as pa

    with naming_damage(path):
        try:
            with _open_parquet(path) as file:
                yield file
        except pa.ArrowException as error:
            raise DataError(f"{path}: truncated or damaged parquet ({_first_line_of(error)})") from error


def _open_parquet(path: File) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix.lower() in COMPRESSED:
        with open_bytes(path) as stream:
            return pq.ParquetFile(pa.BufferReader(stream.read()))
    if isinstance(path, Path):
        return pq.ParquetFile(path, memory_map=True)
    return pq.ParquetFile(path.open("rb"), pre_buffer=True)


def _require_text_column(schema: Any, path: File, column: str) -> None:
    import pyarrow as pa

    if column not in schema.names:
        raise DataError(_no_column(path, column, schema.names))
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


def _first_line_of(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
