"""Output of `swamla bench`: on a terminal a table at a time, elsewhere one line per row at once."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from swamla.bench.results import Row, in_bytes, in_rate, in_seconds
from swamla.cli.console import say, say_wrapped
from swamla.cli.info_tables import short

Cell = Callable[[Any], str]  # of a row


def _of(key: str, words: Callable[[Any], str]) -> Cell:
    return lambda row: "–" if row.get(key) is None else words(row[key])


def _step(row: Any) -> str:
    if row["rounds"] == 1:
        return in_seconds(row["median_s"])
    deviation = (row["high_s"] - row["low_s"]) / 2 / row["median_s"]
    return f"{in_seconds(row['median_s'])} ±{deviation:.0%}"


def _state(row: Any) -> str:
    accounted = row["accounted_state_bytes"]
    differs = "" if row["state_bytes"] == accounted else f", accounted {in_bytes(accounted)}"
    return in_bytes(row["state_bytes"]) + differs


def _rate(rate: float) -> str:
    return in_rate(rate) if rate < 1e6 else f"{short(rate)}/s"


_TOKENS = _of("tokens_per_s", _rate)
COLUMNS: dict[str, dict[str, Cell]] = {
    "training": {
        "": _of("name", str),
        "tokens": _TOKENS,
        "step": _step,
        "forward": _of("forward_s", in_seconds),
        "backward": _of("backward_s", in_seconds),
        "rest": _of("optimizer_s", in_seconds),
        "matmul": _of("matmul_share", "{:.0%}".format),
        "memory": _of("peak_bytes", in_bytes),
    },
    "generation": {
        "": _of("name", str),
        "prefill": _of("prefill_tokens_per_s", _rate),
        "first token": _of("first_token_s", in_seconds),
        "decode": _of("decode_tokens_per_s", in_rate),
        "state": _state,
        "all-MHA state": _of("all_mha_state_bytes", in_bytes),
    },
    "data": {
        "": _of("name", str),
        "tokens": _TOKENS,
        "text": _of("text_bytes_per_s", lambda rate: f"{in_bytes(rate)}/s"),
        "faster than training": _of("times_training", "{:,.0f} ×".format),
    },
    "start-up": {"": _of("name", str), "time": _of("median_s", in_seconds)},
}
TITLES = {
    "training": "training, by the rows × tokens of a step",
    "generation": "generation, one sequence",
    "data": "data, in one process",
    "start-up": "start-up, of new processes",
}


def line(table: str, row: Row) -> str:
    """A row for pipes and log files."""
    if "error" in row:
        return f"{table}: {row['name']}: not measured: {row['error']}"
    name, *cells = [(heading, cell(row)) for heading, cell in COLUMNS[table].items()]
    words = [f"{heading} {text}" for heading, text in cells if text != "–"]
    return f"{table}: {name[1]}: {', '.join(words)}"


class Screen:
    """Shows the rows; on exit of the context it shows the last table."""

    def __init__(self, console: Console) -> None:
        self._console = console
        # No automatic refresh: its thread would disturb the measurement.
        self._status = Live(console=console, auto_refresh=False, transient=True)
        self._table, self._rows = "", list[Row]()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._status.start()
        return self

    def stage(self, text: str) -> None:
        """Show what is being measured, on terminals only."""
        if self._console.is_terminal:
            self._status.update(Text(f"measuring {text} …", style="dim"), refresh=True)

    def row(self, table: str, row: Row) -> None:
        """Show a row, or collect it for its table."""
        if not self._console.is_terminal:
            say_wrapped(self._console, line(table, row), indent=2)
            return
        if table != self._table:
            self._show()
        self._table = table
        self._rows.append(row)

    def _show(self) -> None:
        measured = [row for row in self._rows if "error" not in row]
        if measured:
            columns = COLUMNS[self._table]
            drawn = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
            for number, heading in enumerate(columns):  # on a narrow terminal fold names, not figures
                drawn.add_column(heading, justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
            for row in measured:
                name, *figures = (cell(row) for cell in columns.values())
                drawn.add_row(name.replace(" packed", "*"), *figures)
            say(self._console, f"\n{TITLES[self._table]}")
            unlimited = self._console.options.update(width=1000)
            if self._console.measure(drawn, options=unlimited).minimum <= self._console.width:
                self._console.print(drawn)
            else:  # each row as a line, wrapped
                for row in measured:
                    say_wrapped(self._console, line(self._table, row), indent=2)
        for row in self._rows:
            if "error" in row:
                say_wrapped(self._console, line(self._table, row), indent=2)
        self._rows = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._status.stop()
        self._show()
