"""Rows as Markdown tables."""

from collections.abc import Callable, Sequence
from textwrap import fill
from typing import Any

Row = dict[str, Any]  # as read from JSON; missing keys are noticed at their use
Cell = Callable[[Row], str]


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in rows)


def pivot(corner: str, rows: Sequence[Row], across: str, cell: Cell) -> str:
    """A table with one line per name, and one column per value of the key `across`."""
    columns = sorted({row[across] for row in rows if across in row})
    names = dict.fromkeys(str(row["name"]) for row in rows)
    at = {(str(row["name"]), row[across]): row for row in rows if across in row}
    lines = [[shown(name), *(_cell(at.get((name, column)), cell) for column in columns)] for name in names]
    return table([corner, *(f"{column:,}" for column in columns)], lines)


def _cell(row: Row | None, cell: Cell) -> str:
    return "" if row is None else "failed" if "error" in row else "–" if "note" in row else cell(row)


def shown(name: str) -> str:
    """The name, as code if it is one of our patterns."""
    pattern, comma, rest = name.partition(",")
    return f"`{pattern}`{comma}{rest}" if set(pattern.split()) <= {"swa", "gdn", "mla", "mha"} else name


def folded(text: str) -> str:
    """The text wrapped to the page's width."""
    return fill(text, 120, break_long_words=False, break_on_hyphens=False)


def measured(rows: Sequence[Row]) -> list[Row]:
    """The rows that have figures."""
    return [row for row in rows if "error" not in row and "note" not in row]


def listed(rows: Sequence[Row], columns: dict[str, Cell]) -> str:
    """A table with one line per row that has figures."""
    lines = [[cell(row) for cell in columns.values()] for row in measured(rows)]
    return table(list(columns), lines)
