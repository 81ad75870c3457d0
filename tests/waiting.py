"""How tests wait for other processes: as long as a slow machine may need, and never leaving one behind."""

import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PATIENCE = 300.0  # seconds until what should have happened counts as not happening; a loaded machine needs some


def until(happened: Callable[[], Any], *, seconds: float = PATIENCE, every: float = 0.01, what: str = "") -> Any:
    """Wait until `happened()` is true, and return what it gave; a file that is not there yet has not happened.

    what: that is waited for, for the message where it does not happen.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if found := happened():
                return found
        except FileNotFoundError:
            pass  # not begun yet
        time.sleep(every)
    raise AssertionError(f"did not happen within {seconds:.0f} s: {what or happened}")


def is_there(port: int) -> bool:
    """Whether something listens on a port of this machine."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def after_start(stderr: str) -> str:
    """What a command wrote to stderr after the line that it prints before it imports torch."""
    return re.sub(r"^swamla \w+: starting, loading torch (…|\.\.\.)\n", "", stderr)


@contextmanager
def running(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process, killed at the block's end if it still runs: `Popen` alone waits, for ever where a test has failed.

    It answers signals though whoever runs the tests ignores them, as what a shell starts in the background does.
    """
    with subprocess.Popen(command, text=True, preexec_fn=answer_signals, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def answer_signals() -> None:
    """Signals do in this process what they do by default, whatever it inherited."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
