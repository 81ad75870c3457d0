"""Rows of jsonl and parquet files, streamed: (row number, text)."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swamla.data.reading import COMPRESSED, decode_utf8, mend_surrogates, naming_damage, open_bytes
from swamla.errors import DataError

_PARQUET_ROWS = 256  # rows decoded at once: they may be long


def jsonl_rows(path: Path, column: str, invalid: str, notes: Counter[str]) -> Iterator[tuple[int, str]]:
    """Each line's text; blank lines are no rows. DataError names file and line of what is not as it should be."""
    row = offset = 0
    with naming_damage(path), open_bytes(path) as lines:
        while line := lines.readline():
            size, where = len(line), f"{path}: line {row + 1}"
            if not line.isspace():
                text = _json_text(decode_utf8(line, path, invalid, notes, offset), column, where)
                del line  # a long one is not kept while its text is worked on
                yield row, mend_surrogates(text, where, invalid, notes)
            row, offset = row + 1, offset + size


def _json_text(line: str, column: str, where: str) -> str:
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


def parquet_rows(path: Path, column: str, invalid: str, notes: Counter[str]) -> Iterator[tuple[int, str]]:
    """Each row's text, a few rows in memory at a time; a null is an empty text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with naming_damage(path):
        packed = path.suffix.lower() in COMPRESSED
        try:
            if packed:
                with open_bytes(path) as stream:
                    file = pq.ParquetFile(pa.BufferReader(stream.read()))
            else:
                file = pq.ParquetFile(path, memory_map=True)
            with file:
                _require_text_column(file.schema_arrow, path, column)
                for row, raw in enumerate(_parquet_bytes(file, column, pa)):
                    yield row, decode_utf8(raw, f"{path}: row {row}", invalid, notes)
        except pa.ArrowException as error:
            raise DataError(f"{path}: truncated or damaged parquet ({_first_line(error)})") from error


def _require_text_column(schema: Any, path: Path, column: str) -> None:
    import pyarrow as pa

    if column not in schema.names:
        raise DataError(_no_column(path, column, schema.names))
    kind = schema.field(column).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(is_text(value) for is_text in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
        raise DataError(f"{path}: column {column!r} needs text, got {kind}")


def _parquet_bytes(file: Any, column: str, pa: Any) -> Iterator[bytes]:
    """The column's values as bytes: Arrow does not promise that its strings are UTF-8."""
    for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[column]):
        for raw in batch.column(0).cast(pa.large_binary()).to_pylist():
            yield raw or b""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
