"""Asking a run to stop: the step is finished and saved first, unless Ctrl-C comes twice."""

import os
import signal
import stat
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from swamla.distributed import launched

FORWARDED = 2.0  # seconds in which torchrun passes on the Ctrl-C that the terminal already sent to every process

_HEEDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
_EXIT_STATUS = {signal.SIGINT: 130, signal.SIGPIPE: 141}  # of all others that of a run that was preempted


class StopRequest:
    """While entered, SIGTERM, SIGUSR1 (Slurm's warning), SIGHUP and Ctrl-C are noted instead of ending the process.

    A second Ctrl-C raises `KeyboardInterrupt` at once. What the process was started to ignore, as SIGHUP under nohup,
    stays ignored. Outside the main thread, where Python allows no handlers, the process's own stay in place.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def exit_status(self) -> int:
        """What the program exits with once it has saved: 75 when preempted, 130 after Ctrl-C, 141 when unread."""
        return _EXIT_STATUS.get(self.received, 75) if self.received else 0

    def unread(self) -> None:
        """Nobody takes what the run says any more, as in `swamla train | head -5`: a reason to save and end, too."""
        self.received = self.received or signal.SIGPIPE

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in _HEEDED if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            drop_dead_terminal()
        again = number == signal.SIGINT and self.received == signal.SIGINT
        if again and time.monotonic() - self._since > (FORWARDED if launched() else 0):
            raise KeyboardInterrupt
        if not again:
            self.received, self._since = signal.Signals(number), time.monotonic()


def drop_dead_terminal() -> None:
    """Send output nowhere that went to a terminal which is gone: writing to it would fail, and the save with it."""
    for output in (1, 2):
        try:
            gone = stat.S_ISCHR(os.fstat(output).st_mode) and not os.isatty(output)
        except OSError:  # it is closed
            continue
        if gone:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, output)
            os.close(nowhere)
