"""The program's output streams, which may be closed or lack characters, and the signals that end it."""

import codecs
import os
import signal
import sys
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import IO, Any

from swamla.signal_notice import say_now, told_at_once

PATIENCE = 0.3  # seconds in which a command ends by itself after a signal, so that there is nothing to say

# Readable substitutes for characters that an output's encoding lacks.
SUBSTITUTES = {
    "…": "...", "–": "-", "—": "-", "−": "-", "·": "*", "•": "*", "×": "x", "±": "+/-", "→": "->", "←": "<-",
    "↑": "^", "↓": "v",
    "✓": "ok", "✗": "FAILED", "≤": "<=", "≥": ">=", "≈": "~", "µ": "u", "°": " degrees", "∞": "inf",
    "√": "sqrt", "⊙": "*", "∝": "~", "‘": "'", "’": "'", "“": '"', "”": '"', "\N{REPLACEMENT CHARACTER}": "?",
    "\N{NO-BREAK SPACE}": " ", "⟨": "<", "⟩": ">", "⇥": "->|", "⏎": "<-|", "½": "1/2", "␣": "_",
}  # fmt: skip


class Ended(BaseException):
    """A signal asked the program to end outside training, with nothing to save. left: what it leaves behind."""

    def __init__(self, number: int, left: str = "no run was under way, the same command starts again") -> None:
        self.number = signal.Signals(number)
        super().__init__(f"stopped by {self.number.name}; {left}")

    @property
    def exit_status(self) -> int:
        """The status that a shell reports for a program ended by this signal."""
        return 128 + self.number


@contextmanager
def after_training(run_dir: Path) -> Iterator[None]:
    """What follows a finished run: a signal here ends the program, which says that the run is saved."""
    try:
        yield
    except Ended as ended:
        raise Ended(ended.number, f"the run is finished, all is saved in {run_dir}") from None
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(f"the run is finished, all is saved in {run_dir}")
        raise


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within this context SIGTERM, SIGUSR1 and SIGHUP raise `Ended`, so that the program cleans up and reports it."""
    names = [name for name in ("SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]  # some systems lack some
    numbers = [getattr(signal, name) for name in names]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # Python allows handlers in the main thread only
    handled = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # under nohup
    before = {number: signal.signal(number, _end) for number in handled}
    try:
        with told_at_once(_tell, patience=PATIENCE):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(number: signal.Signals, count: int) -> str:
    """What to say of a signal that has not ended the command within `PATIENCE`; the second one ends it here."""
    if count == 1:
        return f"stopping ({number.name}), when the library's call that runs now returns; again to leave now"
    say_now("left at once")
    os._exit(128 + number)


def open_outputs() -> None:
    """Make stdout and stderr writable: a closed one goes to /dev/null, unencodable characters get substitutes.

    Otherwise a file opened later would get the closed stream's descriptor, and the printed text with it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, which is this one
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8")
    codecs.register_error("swamla", _readable)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors in ("strict", "surrogateescape", "backslashreplace"):
            stream.reconfigure(errors="swamla")


def substitute(character: str) -> str:
    """A readable form of one character in ASCII: a substitute, the letter without its accents, or its number."""
    if character in SUBSTITUTES:
        return SUBSTITUTES[character]
    name = unicodedata.name(character, "")
    if name.startswith("GREEK"):
        return name.split()[-1].lower()
    if "\u2500" <= character <= "\u259f":  # lines and blocks of tables and bars
        return "-" if name.endswith(" HORIZONTAL") else "|" if name.endswith(" VERTICAL") else "+"
    if "\N{BRAILLE PATTERN BLANK}" <= character <= "\N{BRAILLE PATTERN DOTS-12345678}":  # of spinners
        return "*"
    plain = unicodedata.normalize("NFKD", character)
    if name.startswith("SUPERSCRIPT"):
        return f"^{plain}" if plain.isascii() else ascii(character)[1:-1]
    letters = "".join(c for c in plain if not unicodedata.combining(c))
    return letters if letters and letters.isascii() else ascii(character)[1:-1]


def _readable(error: UnicodeError) -> tuple[str, int]:
    """Encoding errors: substitutes for what cannot be encoded."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(substitute, error.object[error.start : error.end])), error.end


def is_terminal(stream: IO[Any]) -> bool:
    """True for a terminal that can erase a line, which a file, a pipe and TERM=dumb cannot."""
    return stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


def flush_outputs() -> None:
    """Flush stdout and stderr. Raises `OSError`, and drops the rest, if one is closed."""
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except OSError:
            discard(number)  # else the interpreter tries again at exit
            raise


def discard(number: int) -> None:
    """What is written to this descriptor from now on, or waits in a buffer, goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def _end(number: int, frame: FrameType | None) -> None:
    raise Ended(number)


@contextmanager
def going_on(folder: Path) -> Iterator[None]:
    """Whoever stops the study is told that nothing is lost."""
    left = f"all is saved in {folder}, and the same command goes on"
    try:
        yield
    except Ended as ended:
        raise Ended(ended.number, left) from None
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(left)
        raise
