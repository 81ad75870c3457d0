"""Texts of the rows of json, csv and tsv files."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from swamla.data.notes import Notes
from swamla.data.reading import BadRow, File, decode_utf8, mend_surrogates, naming_damage, open_bytes
from swamla.data.rows import RowRules, Span, jsonl_rows, no_column, parquet_rows, row_text
from swamla.errors import DataError

_LONGEST_FIELD = (1 << 31) - 1
_SPACE = " \t\r\n"


class NoRows(DataError):
    """A file that is as it should be, but holds no rows with the column that is asked for."""


def json_rows(path: File, rules: RowRules, notes: Notes, span: Span | None = None) -> Iterator[str]:
    """Texts of a .json file, read as a whole unless each line of it is a row.

    Rows are the items of an array; the objects that follow each other; one object's own text or list of texts; or, of
    an object that has no such text, its one list of objects, or its values where all are objects. Raises NoRows if the
    first row has no text, DataError as `jsonl_rows` does.
    """
    with naming_damage(path), open_bytes(path) as stream:
        first = stream.readline()
        lines = _is_row(first, rules.column)
        data = b"" if lines else first + stream.read()
    if lines:
        yield from jsonl_rows(path, rules, notes)
        return
    whole = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    for number, row in enumerate(_rows_of(path, whole, rules, notes)):
        where = f"{path}: row {number}"
        try:
            text = mend_surrogates(row_text(row, rules.column, where), where, rules.invalid, notes)
        except BadRow as bad:
            if not number and not (isinstance(row, dict) and rules.column in row):
                raise NoRows(str(bad)) from None
            rules.judge(bad, notes)
        else:
            yield text


def _is_row(line: bytes, column: str) -> bool:
    """Whether a line is a whole object that has a text in the column."""
    try:
        row = json.loads(line.decode("utf-8", "replace").lstrip("\ufeff"))
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and isinstance(row.get(column), str)


def _rows_of(path: File, text: str, rules: RowRules, notes: Notes) -> Iterator[Any]:
    """The rows of all JSON values in `text`; what is not JSON ends them as a bad row."""
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
    """Texts of a table whose first row names its columns; fields with line ends or delimiters are in "quotes".

    Raises NoRows if no column is so called; DataError names the line at which a bad row begins.
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
                            f"{path}: has several columns {rules.column!r}: give the text's a name of its own"
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
    """All of a text file as one text."""
    with naming_damage(path), open_bytes(path) as stream:
        data = stream.read()
    try:
        text = decode_utf8(data, path, rules.invalid, notes)
    except BadRow as bad:
        rules.judge(bad, notes)
    else:
        yield text.removeprefix("\ufeff")  # a mark of the file, not its text


Reader = Callable[[File, RowRules, Notes, Span | None], Iterator[str]]
READERS: dict[str, Reader] = {
    ".jsonl": jsonl_rows,
    ".ndjson": jsonl_rows,
    ".json": json_rows,
    ".csv": partial(csv_rows, delimiter=","),
    ".tsv": partial(csv_rows, delimiter="\t"),
    ".parquet": parquet_rows,
}
