"""Console output of a run: a progress bar or plain lines."""

import errno
import os
import textwrap
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn

from swamla import distributed


class Display(Protocol):
    """Console output of a run."""

    def update(self, progress: float, seconds: float, values: Mapping[str, float]) -> None:
        """Show a training step: `values` has step, loss, lr and tokens_per_second, and bits_per_byte for texts."""

    def say(self, text: str) -> None:
        """Print a line."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def say(console: Console, text: str) -> None:
    """Print plain text as it is: no markup, no wrapping, no highlighting."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def fill(console: Console, text: str, *, label: str = "", indent: int = 0) -> str:
    """`text` behind `label`, wrapped at words to the width of a terminal, or to COLUMNS; in files it stays one line.

    indent: of all lines but the first.
    """
    if not console.is_terminal and "COLUMNS" not in os.environ:
        return label + text
    return textwrap.fill(
        text,
        max(20, console.width),
        initial_indent=label,
        subsequent_indent=" " * indent,
        break_long_words=False,  # of a path or a command, which are copied
        break_on_hyphens=False,
    )


def time_left(progress: float, seconds: float) -> str:
    """The estimated remaining time, as "3:05 left"."""
    left = round(seconds * (1 - progress) / progress) if 0 < progress < 1 else 0
    hours, minutes = divmod(left // 60, 60)
    return f"{hours}:{minutes:02}:{left % 60:02} left" if hours else f"{minutes}:{left % 60:02} left"


def _epoch(values: Mapping[str, float]) -> str:
    return f"Epoch: {values['epoch']:.2f} | " if "epoch" in values else ""


def _bits(values: Mapping[str, float]) -> str:
    return f"Bits/byte: {values['bits_per_byte']:.4f} | " if "bits_per_byte" in values else ""


class PlainLines:
    """A line for the first step, every `interval`-th and the last; for pipes and log files."""

    def __init__(self, console: Console, interval: int) -> None:
        self._console, self._interval = console, interval
        self._pending = ""  # the line of the newest step if it was not printed

    def update(self, progress: float, seconds: float, values: Mapping[str, float]) -> None:
        """Print the step's line if it is due."""
        self._pending = (
            f"Step {values['step']:.0f} | Loss: {values['loss']:.4f} | LR: {values['lr']:.2e} | "
            f"Tokens/sec: {values['tokens_per_second']:,.0f} | {_bits(values)}"
            f"{_epoch(values)}{time_left(progress, seconds)}"
        )
        if values["step"] == 1 or values["step"] % self._interval == 0 or progress >= 1:
            self._say_step()

    def _say_step(self) -> None:
        if self._pending:
            say(self._console, self._pending)
            self._pending = ""

    def say(self, text: str) -> None:
        """Print a line, after that of the step it follows."""
        self._say_step()
        say(self._console, text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._say_step()  # the last step, if the run ended by time or was stopped


class ProgressBar:
    """One live line on a terminal: progress, step, loss, bits per byte, speed and time left; less on a narrow one."""

    _TEXT = "step {task.fields[step]}  loss {task.fields[loss]}{task.fields[bits]}"
    _SPEED = "  {task.fields[speed]} tok/s"
    _WIDE, _MEDIUM = 105, 76  # columns for the bar and for the speed

    def __init__(self, console: Console) -> None:
        columns: list[ProgressColumn] = [TextColumn("[bold]{task.percentage:>3.0f}%")]
        if console.width >= self._WIDE:
            columns.append(BarColumn(bar_width=24))
        text = self._TEXT + (self._SPEED if console.width >= self._MEDIUM else "")
        self._progress = Progress(
            *columns, TextColumn(text, markup=False), TextColumn("[dim]{task.fields[eta]}"), console=console
        )
        self._task = self._progress.add_task("", total=1.0, step="0", loss="–", bits="", speed="–", eta="")

    def update(self, progress: float, seconds: float, values: Mapping[str, float]) -> None:
        """Move the bar."""
        self._progress.update(
            self._task,
            completed=min(progress, 1.0),
            step=f"{values['step']:,.0f}",
            loss=f"{values['loss']:.3f}",
            bits=f"  {values['bits_per_byte']:.3f} bits/byte" if "bits_per_byte" in values else "",
            speed=f"{values['tokens_per_second']:,.0f}",
            eta=time_left(progress, seconds),
        )

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        say(self._progress.console, text)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class Silence:
    """The display of ranks other than the main one, which shows nothing."""

    def update(self, progress: float, seconds: float, values: Mapping[str, float]) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class WhileRead:
    """A display that calls `unread` once its output is closed, and shows nothing more."""

    def __init__(self, display: Display, unread: Callable[[OSError], None]) -> None:
        self._display, self._unread, self._closed = display, unread, False

    def update(self, progress: float, seconds: float, values: Mapping[str, float]) -> None:
        """Show a step while the output is open."""
        self._show(lambda: self._display.update(progress, seconds, values))

    def say(self, text: str) -> None:
        """Show a line while the output is open."""
        self._show(lambda: self._display.say(text))

    def _show(self, work: Callable[[], object]) -> None:
        if self._closed:
            return
        try:
            work()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # a closed pipe or terminal
                raise
            self._closed = True
            self._unread(error)

    def __enter__(self) -> Self:
        self._show(self._display.__enter__)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show(lambda: self._display.__exit__(kind, error, trace))


def make_display(console: Console, interval: int) -> Display:
    """A progress bar on a terminal that can erase lines, else a line every `interval` steps; nothing on other ranks."""
    if not distributed.is_main():
        return Silence()
    return ProgressBar(console) if console.is_interactive else PlainLines(console, interval)
