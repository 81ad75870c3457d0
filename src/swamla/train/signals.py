"""Stop requests by signal: the run finishes its step and saves before it ends, unless Ctrl-C comes twice."""

import os
import signal
import stat
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from swamla.distributed import launched

FORWARDED = 2.0  # seconds in which torchrun passes on the Ctrl-C that the terminal already sent to every process

_HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
_EXIT_STATUS = {signal.SIGINT: 130, signal.SIGPIPE: 141}  # 75, preempted, for all others


class StopRequest:
    """Context in which SIGTERM, SIGUSR1 (Slurm's warning), SIGHUP and Ctrl-C request a stop of the run.

    A second Ctrl-C raises `KeyboardInterrupt` at once. A signal that the process ignores from its start, as SIGHUP
    under nohup, stays ignored. Outside the main thread, where Python allows no handlers, nothing is changed.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def exit_status(self) -> int:
        """Exit status after saving: 75 if preempted, 130 after Ctrl-C, 141 after the output was closed."""
        return _EXIT_STATUS.get(self.received, 75) if self.received else 0

    def unread(self) -> None:
        """Request a stop because the output was closed, as by `swamla train | head -5`."""
        self.received = self.received or signal.SIGPIPE

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            handled = [number for number in _HANDLED if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._note) for number in handled}
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
    """Redirect output from a closed terminal to /dev/null, because writing to it would fail, also during the save."""
    for output in (1, 2):
        try:
            gone = stat.S_ISCHR(os.fstat(output).st_mode) and not os.isatty(output)
        except OSError:  # closed already
            continue
        if gone:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, output)
            os.close(nowhere)
