"""How tests wait for other processes: as long as a slow machine may need, and never leaving one behind."""

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PATIENCE = 300.0  # seconds until what should have happened counts as not happening; a loaded machine needs some


def until(happened: Callable[[], Any], *, seconds: float = PATIENCE, every: float = 0.01) -> Any:
    """Wait until `happened()` is true, and return what it gave; a file that is not there yet has not happened."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if found := happened():
                return found
        except FileNotFoundError:
            pass  # not begun yet
        time.sleep(every)
    raise AssertionError(f"did not happen within {seconds:.0f} s: {happened}")


@contextmanager
def running(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process, killed at the block's end if it still runs: `Popen` alone waits, for ever where a test has failed."""
    with subprocess.Popen(command, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()
