"""Results of a benchmark, row by row, in a file that is complete after every row."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from swamla.errors import CorruptError
from swamla.files import entry, read_json, write_text_atomically

Row = dict[str, str | int | float | None]
FORMAT = 1


def _print(line: str) -> None:
    print(line, flush=True)


@dataclass(kw_only=True)
class Results:
    """The rows of all tables, the command and the machine.

    Times are in seconds, memory in bytes, rates per second, as a row's key says: "median_s", "tokens_per_s",
    "peak_bytes". A row that failed has "error" instead of figures.
    command: the command line.
    machine: from `measuring.machine`.
    ceilings: from `measuring.ceilings`.
    file: the JSON file; None writes none.
    say: called with a readable line for each row.
    begun: date and time, ISO 8601, UTC.
    seconds: since then, at the last row.
    rows: by table.
    """

    command: str
    machine: dict[str, object] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    file: Path | None = None
    say: Callable[[str], None] = _print
    begun: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    seconds: float = 0.0
    rows: dict[str, list[Row]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._start = time.monotonic() - self.seconds

    def add(self, table: str, row: Row) -> None:
        """Append a row, print it in one line and rewrite the file.

        Raises `ValueError` for a row that JSON cannot represent, e.g. with NaN.
        """
        json.dumps(row, allow_nan=False)
        self.rows.setdefault(table, []).append(row)
        self.say(readable(table, row))
        self.seconds = round(time.monotonic() - self._start, 1)
        self.save()

    def failed(self, table: str, name: str, error: BaseException | str) -> None:
        """Add a row with an error instead of figures."""
        words = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        self.add(table, {"name": name, "error": " ".join(words.split())})

    def plain(self) -> dict[str, Any]:
        """Everything as JSON data."""
        return {
            "format": FORMAT,
            "command": self.command,
            "begun": self.begun,
            "seconds": self.seconds,
            "machine": self.machine,
            "ceilings": self.ceilings,
            "tables": self.rows,
        }

    def save(self) -> None:
        """Write the file, if there is one."""
        if self.file is not None:
            write_text_atomically(self.file, json.dumps(self.plain(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote. Raises `CorruptError` for any other file. Rows added later are not saved."""
        file = Path(path)
        data = read_json(file, inside=file.parent)
        if data.get("format") != FORMAT:
            raise CorruptError(f"{file}: format {data.get('format')!r}: this version reads {FORMAT}")
        seconds = data.get("seconds")
        if not isinstance(seconds, int | float):
            raise CorruptError(f'{file}: damaged: "seconds" is {seconds!r}, expected a number')
        return cls(
            command=entry(data, "command", str, file=file),
            begun=entry(data, "begun", str, file=file),
            seconds=seconds,
            machine=entry(data, "machine", dict, file=file),
            ceilings=entry(data, "ceilings", dict, file=file),
            rows=entry(data, "tables", dict, file=file),
        )


def readable(table: str, row: Row) -> str:
    """A row in one line: `training  swa swa mla  length 1,024  median 724 ms  tokens 5,654/s`."""
    words = [str(row["name"])] if "name" in row else []
    words += [in_words(key, value) for key, value in row.items() if key != "name" and value is not None]
    return "  ".join([table, *words])


def in_words(key: str, value: str | int | float) -> str:
    """A figure as text, with its name and unit; the key ends with the unit."""
    for suffix, unit in _UNITS.items():
        if key.endswith(suffix) and not isinstance(value, str):
            return f"{key.removesuffix(suffix).replace('_', ' ')} {unit(value)}".strip()
    figure = f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else value
    return f"{key.replace('_', ' ')} {figure}"


def in_seconds(seconds: float) -> str:
    """A time as text, with three digits."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}" if seconds * factor < 1000 else f"{seconds * factor:,.0f} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def in_bytes(n_bytes: float) -> str:
    """Bytes as text, with three digits."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.3g} {unit}"
    return f"{n_bytes:.0f} B"


def in_rate(rate: float) -> str:
    """A rate per second as text."""
    return f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.3g}/s"


_UNITS: dict[str, Callable[[float], str]] = {
    "_bytes_per_s": lambda rate: f"{in_bytes(rate)}/s",
    "_per_s": in_rate,
    "_bytes": in_bytes,
    "_share": lambda share: f"{share:.1%}",
    "_s": in_seconds,
}
