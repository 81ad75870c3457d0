"""The program's own outputs and signals: whatever state it was started in, and however it is asked to end."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from types import FrameType


class Ended(BaseException):
    """A signal asked the program to end while no run was being trained, which would be saved first."""

    def __init__(self, number: int) -> None:
        self.number = signal.Signals(number)
        super().__init__(f"stopped by {self.number.name}; no run was under way, the same command begins again")

    @property
    def exit_status(self) -> int:
        """What a shell reports for a program that the signal itself ended."""
        return 128 + self.number


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """While entered SIGTERM, SIGUSR1 and SIGHUP raise `Ended`, so that all is cleared up and told."""
    names = [name for name in ("SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]  # not all systems have all
    numbers = [getattr(signal, name) for name in names]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # where Python allows no handlers
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup has it
    before = {number: signal.signal(number, _end) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_outputs() -> None:
    """Make both outputs writable: where one is closed it leads nowhere, and no character is too much for its encoding.

    A file that is opened later would otherwise be given the closed one's number, and what is printed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8")
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as Python itself has it for stderr


def flush_outputs() -> None:
    """Write what is still buffered. Raises `OSError`, and gives the rest up, where nobody takes it any more."""
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)  # or the interpreter tries again when it ends
            raise


def _end(number: int, frame: FrameType | None) -> None:
    raise Ended(number)
