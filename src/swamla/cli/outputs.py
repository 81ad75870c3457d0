"""The program's output streams, which may be closed, and the signals that end it."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from types import FrameType


class Ended(BaseException):
    """A signal asked the program to end outside training, with nothing to save."""

    def __init__(self, number: int) -> None:
        self.number = signal.Signals(number)
        super().__init__(f"stopped by {self.number.name}; no run was under way, the same command starts again")

    @property
    def exit_status(self) -> int:
        """The status that a shell reports for a program ended by this signal."""
        return 128 + self.number


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
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_outputs() -> None:
    """Make stdout and stderr writable: a closed one goes to /dev/null, and unencodable characters are escaped.

    Otherwise a file opened later would get the closed stream's descriptor, and the printed text with it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, which is this one
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8")
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as for stderr in Python


def flush_outputs() -> None:
    """Flush stdout and stderr. Raises `OSError`, and drops the rest, if one is closed."""
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)  # else the interpreter tries again at exit
            raise


def _end(number: int, frame: FrameType | None) -> None:
    raise Ended(number)
