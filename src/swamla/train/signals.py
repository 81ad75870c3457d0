"""Stop requests by signal: the run finishes its step and saves before it ends, unless a second one comes."""

import errno
import os
import signal
import stat
import threading
import time
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Any, Self

from swamla.distributed import is_main, launched
from swamla.errors import LeftAtOnce
from swamla.signal_notice import APART, told_at_once

_HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
_LEAVING = (signal.SIGTERM, signal.SIGINT)  # of which a second one does not wait for the save
STEP = "finishing this step, then saving"
EVALUATION, FINISHING = "ending the evaluation, then saving", "finishing the evaluation, then saving"
SAVING, SAVED = "saving", "all is saved, ending"
_EXIT_STATUS = {signal.SIGINT: 130, signal.SIGPIPE: 141}  # 75, preempted, for all others


class StopRequest:
    """Context in which SIGTERM, SIGUSR1 (Slurm's warning), SIGHUP and Ctrl-C request a stop of the run.

    What happens is said at once. A second Ctrl-C raises `KeyboardInterrupt`, a second SIGTERM `LeftAtOnce`; SIGTERM
    after Slurm's warning does not. A signal that the process ignores from its start, as SIGHUP under nohup, stays
    ignored. Outside the main thread, where Python allows no handlers, nothing is changed.

    doing: what goes on before the run ends, for the line that is said.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}
        self._open = ExitStack()
        self.doing = STEP

    @property
    def exit_status(self) -> int:
        """Exit status after saving: 75 if preempted, 130 after Ctrl-C, 141 after the output was closed."""
        return _EXIT_STATUS.get(self.received, 75) if self.received else 0

    def unread(self, error: OSError) -> None:
        """Request a stop because the output is closed: a pipe, as by `swamla train | head -5`, or the terminal.

        A write to a terminal that is gone can fail before its SIGHUP arrives; both are one cause.
        """
        self.received = self.received or (signal.SIGHUP if error.errno == errno.EIO else signal.SIGPIPE)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            handled = [number for number in _HANDLED if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._note) for number in handled}
        self._open.enter_context(told_at_once(self._tell))
        return self

    def _tell(self, number: signal.Signals, count: int) -> str:
        """The line for a signal."""
        if not is_main():
            return ""
        if count > 1:
            return "leaving at once" if number in _LEAVING else ""
        more = "; again to leave now" if number in _LEAVING else ""
        return f"stop requested ({number.name}): {self.doing}{more}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            drop_dead_terminal()
        again = number in _LEAVING and self.received is not None and number in (self.received, signal.SIGINT)
        apart = 0.0 if number == signal.SIGINT and not launched() else APART
        if again and time.monotonic() - self._since > apart:
            raise KeyboardInterrupt if number == signal.SIGINT else LeftAtOnce(number)
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
