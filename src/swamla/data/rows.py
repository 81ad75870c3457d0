"""The texts of one file: one per row (jsonl, json, csv, tsv, parquet), or the whole file as one text.

`READERS` maps suffixes to readers. jsonl and parquet files are streamed.

A span is a part of a file that can be read independently: byte offsets [begin, end) of a jsonl file, or numbers of row
groups of a parquet file. A line belongs to the span in which it begins, so that consecutive spans have every row
exactly once, wherever the file is divided.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from swamla.data.config import DataConfig
from swamla.data.reading import BadRow, File, Notes, decode_utf8, is_plain, mend_surrogates, naming_damage, open_bytes
from swamla.errors import DataError, foreign

Span = tuple[int, int]

_PARQUET_ROWS = 256  # rows per batch: they may be long
_SKIPPED = 1 << 20  # bytes read at a time while skipping text
_LONGEST_FIELD = (1 << 31) - 1
_SPACE = " \t\r\n"


class NoRows(DataError):
    """An undamaged file without rows that have the text column."""


@dataclass(frozen=True)
class RowRules:
    """The text column, and what to do with bad rows: `text_column`, `invalid_utf8`, `on_bad_row` of `DataConfig`."""

    column: str = "text"
    invalid: str = "error"
    on_bad_row: str = "stop"

    @classmethod
    def of(cls, config: DataConfig) -> "RowRules":
        """The rules of a config."""
        return cls(config.text_column, config.invalid_utf8, config.on_bad_row)

    def judge(self, bad: BadRow, notes: Notes) -> None:
        """Handle a bad row: count and skip it, or raise DataError, as configured."""
        if self.on_bad_row == "stop":
            raise DataError(f'{bad} (or leave such rows out: on_bad_row = "skip")') from bad.__cause__
        notes.add("bad rows skipped", bad)


class _Line:
    """The place of a line, for errors. A line number that is not known is counted only when it is displayed."""

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
    """The text of each line; blank lines are skipped. DataError names the file and line of a bad row.

    span: byte offsets; a line belongs to the span in which it begins.
    """
    with naming_damage(path), open_bytes(path) as lines:
        offset = _first_line(lines, *span) if span else 0
        number = 0 if span and span[0] else 1  # 0: unknown, as the span does not begin with the first line
        while (span is None or offset < span[1]) and (line := lines.readline()):
            size = len(line)
            where: object = _Line(path, offset, number)
            if not number and rules.on_bad_row == "skip":  # counting lines would read the file again for each bad row
                where = f"{path}: the line at byte {offset}"
            try:
                text = "" if line.isspace() else decode_utf8(line, path, rules.invalid, notes, offset)
                blank = not text.strip("\ufeff \t\r\n")  # also a file with nothing but a byte-order mark
                del line  # frees a long line before it is parsed
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
    """The offset of the first line that begins at or after `begin`; seeks there, unless that is at or beyond `end`."""
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
    """The text of a parsed JSON row, "" for null. BadRow if the row is not an object or has no text in the column."""
    if not isinstance(row, dict):
        raise BadRow(where, f'needs an object such as {{"{column}": "…"}}, got {type(row).__name__}')
    if column not in row:
        raise BadRow(where, no_column(column, list(row)))
    if not isinstance(row[column], str | None):
        raise BadRow(where, f"column {column!r} needs text, got {type(row[column]).__name__}")
    return row[column] or ""


def no_column(column: str, columns: list[str]) -> str:
    """The error message for a missing column: lists the columns, and the flag that chooses one."""
    names = [repr(name.encode("utf-8", "replace").decode())[:40] for name in columns[:20]]
    some = ", ".join(names) + (f" … ({len(columns)} in all)" if len(columns) > 20 else "")
    return f"no column {column!r}; it has {some or 'none'} (choose by `text_column`)"


def parquet_rows(path: File, rules: RowRules, notes: Notes, span: Span | None = None) -> Iterator[str]:
    """The text of each row, "" for null; reads a few rows at a time. span: numbers of row groups."""
    with _parquet(path) as file:
        _require_text_column(file.schema_arrow, path, rules.column)
        groups = range(*span) if span else range(file.num_row_groups)
        if groups.stop > file.num_row_groups:
            raise DataError(f"{path}: has {file.num_row_groups} row groups, but had {groups.stop}; restore the file")
        row = sum(file.metadata.row_group(group).num_rows for group in range(groups.start))
        for raw in _parquet_bytes(file, rules.column, groups):
            try:
                text = decode_utf8(raw, f"{path}: row {row}", rules.invalid, notes)
            except BadRow as bad:
                rules.judge(bad, notes)
            else:
                yield text
            row += 1


def parquet_spans(path: File, column: str, size: int) -> list[Span]:
    """Ranges of row groups with about `size` bytes of uncompressed text. DataError for a file without the column."""
    spans: list[Span] = []
    begin = gathered = 0
    with _parquet(path) as file:
        _require_text_column(file.schema_arrow, path, column)
        count = file.num_row_groups
        for number in range(count):
            group = file.metadata.row_group(number)
            columns = (group.column(i) for i in range(group.num_columns))
            gathered += sum(c.total_uncompressed_size for c in columns if c.path_in_schema == column)
            if gathered >= size:
                spans.append((begin, number + 1))
                begin, gathered = number + 1, 0
    return [*spans, (begin, count)] if begin < count else spans


@contextmanager
def _parquet(path: File) -> Iterator[Any]:
    """Open a parquet file; its errors become a DataError that names the file."""
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


def json_rows(path: File, rules: RowRules, notes: Notes, span: Span | None = None) -> Iterator[str]:
    """The texts of a .json file, which is read as a whole unless every line is a row.

    Rows are the items of an array; consecutive objects; the text, or list of texts, of a single object; or, if that
    object lacks the text column, the items of its only list of objects, or its values if all are objects. Raises NoRows
    if the first row has no text, DataError as `jsonl_rows` does.
    """
    with naming_damage(path), open_bytes(path) as stream:
        first, second = stream.readline(), stream.readline()
        # If the second value spans several lines, lines are not rows.
        lines = _is_row(first, rules.column) and second.strip()[-1:] in (b"", b"}")
        data = b"" if lines else first + second + stream.read()
    if lines:
        yield from jsonl_rows(path, rules, notes)
        return
    whole = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    for number, row in enumerate(_rows_of(path, whole, rules, notes)):
        where = f"{path}: row {number}"
        try:
            text = mend_surrogates(row_text(row, rules.column, where), where, rules.invalid, notes)
        except BadRow as bad:
            # For example a description of a table: {"features": {"text": {"dtype": "string"}}}.
            of_text = isinstance(row, dict) and rules.column in row and not isinstance(row[rules.column], dict | list)
            if not number and not of_text:
                raise NoRows(str(bad)) from None
            rules.judge(bad, notes)
        else:
            yield text


def begins_with_row(head: bytes, column: str) -> bool:
    """Whether a file that begins with `head` seems to have JSON lines; `head` may end within the first line."""
    line, whole, _ = head.partition(b"\n")
    if whole:
        return _is_row(line, column)
    key = re.escape(json.dumps(column, ensure_ascii=False).encode())
    return head.lstrip(b"\xef\xbb\xbf \t").startswith(b"{") and re.search(key + rb'\s*:\s*"', head) is not None


def _is_row(line: bytes, column: str) -> bool:
    """Whether a line is a JSON object with a text in the column."""
    try:
        row = json.loads(line.decode("utf-8", "replace").lstrip("\ufeff"))
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and isinstance(row.get(column), str)


def _rows_of(path: File, text: str, rules: RowRules, notes: Notes) -> Iterator[Any]:
    """The rows of all JSON values in `text`, up to the first part that is not JSON, which is a bad row."""
    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        if text[at] in _SPACE:
            at += 1
            continue
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            rules.judge(BadRow(path, f"not JSON ({error})"), notes)
            return
        yield from _rows_in(value, rules.column)


def _rows_in(value: Any, column: str) -> list[Any]:
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        return [value]
    if column in value:  # a row, or a column of texts
        texts = value[column]
        texts = list(texts.values()) if isinstance(texts, dict) else texts
        return [{column: text} for text in texts] if isinstance(texts, list) else [value]
    lists = [each for each in value.values() if isinstance(each, list) and each and isinstance(each[0], dict)]
    if len(lists) == 1:
        return lists[0]
    return list(value.values()) if value and all(isinstance(each, dict) for each in value.values()) else [value]


def csv_rows(path: File, rules: RowRules, notes: Notes, span: Span | None = None, *, delimiter: str) -> Iterator[str]:
    """The texts of a table with a header; fields with line ends or delimiters are quoted.

    Raises NoRows if the header lacks the column; DataError names the line at which a bad row begins.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    with naming_damage(path), open_bytes(path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            where = f"{path}: line {rows.line_num + 1}"
            try:
                row = next(rows, None)
                if row is None:
                    return
                if header is None:
                    header = row
                    if rules.column not in header:
                        raise NoRows(f"{path}: {no_column(rules.column, header)}")
                    if header.count(rules.column) > 1:
                        raise DataError(
                            f"{path}: has several columns {rules.column!r}: rename all but the one with the text"
                        )
                    continue
                if not row:
                    continue  # an empty line
                found = mend_surrogates(_cell(row, header, rules.column, where), where, rules.invalid, notes)
            except csv.Error as error:
                rules.judge(BadRow(where, f"not a row of a table, or badly quoted ({error})"), notes)
            except BadRow as bad:
                rules.judge(bad, notes)
            else:
                yield found


def _cell(row: list[str], header: list[str], column: str, where: object) -> str:
    if len(row) != len(header):
        raise BadRow(where, f"has {len(row)} fields, the first row {len(header)}: are texts with commas in quotes?")
    return row[header.index(column)]


def text_file(path: File, rules: RowRules, notes: Notes, span: Span | None = None) -> Iterator[str]:
    """A text file as one text."""
    with naming_damage(path), open_bytes(path) as stream:
        data = stream.read()
    try:
        text = decode_utf8(data, path, rules.invalid, notes)
    except BadRow as bad:
        rules.judge(bad, notes)
    else:
        yield text.removeprefix("\ufeff")  # the byte-order mark is not part of the text


Reader = Callable[[File, RowRules, Notes, Span | None], Iterator[str]]
READERS: dict[str, Reader] = {
    ".jsonl": jsonl_rows,
    ".ndjson": jsonl_rows,
    ".jsonlines": jsonl_rows,
    ".jl": jsonl_rows,
    ".json": json_rows,
    ".csv": partial(csv_rows, delimiter=","),
    ".tsv": partial(csv_rows, delimiter="\t"),
    ".parquet": parquet_rows,
}
