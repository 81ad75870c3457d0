"""Asking a run to stop: the step is finished and saved first, unless Ctrl-C comes twice."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from swamla.distributed import launched

FORWARDED = 2.0  # seconds in which torchrun passes on the Ctrl-C that the terminal already sent to every process

_EXIT_STATUS = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}


class StopRequest:
    """While entered, SIGTERM, SIGUSR1 (Slurm's warning) and Ctrl-C are noted instead of ending the process.

    A second Ctrl-C raises `KeyboardInterrupt` at once. Outside the main thread, where Python allows no handlers, the
    process's own stay in place.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def exit_status(self) -> int:
        """What the program exits with once it has saved: 75 when it was preempted, 130 after Ctrl-C."""
        return _EXIT_STATUS[self.received] if self.received else 0

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in _EXIT_STATUS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT and self.received == signal.SIGINT
        if again and time.monotonic() - self._since > (FORWARDED if launched() else 0):
            raise KeyboardInterrupt
        if not again:
            self.received, self._since = signal.Signals(number), time.monotonic()
