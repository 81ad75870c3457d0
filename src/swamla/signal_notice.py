"""Says at once that a signal has arrived: Python runs its handlers only between two lines of the main thread.

That may be after a product of seconds, or after a library's call of minutes.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from swamla.distributed import launched

APART = 2.0  # seconds; a signal that comes sooner after another was sent with it, as torchrun and `timeout` do


@contextmanager
def told_at_once(tell: Callable[[signal.Signals, int], str], *, patience: float = 0.0) -> Iterator[None]:
    """Within this context every signal with a Python handler is told on stderr by a thread.

    tell: the line for the signal, of which this is the n-th, from 1; "" for nothing. patience: seconds in which the
    context may end instead, so that there is nothing to say. Outside the main thread nothing is told.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived, sent = os.pipe()
    os.set_blocking(sent, False)
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(arrived, tell, patience, over), daemon=True)
    before = signal.set_wakeup_fd(sent, warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before, warn_on_full_buffer=False)
        over.set()
        os.set_blocking(sent, True)  # for the end there is room once the thread has read
        os.write(sent, b"\0")
        thread.join()
        os.close(arrived)
        os.close(sent)


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    """Within this context `handler` gets these signals, and `told_at_once` tells of none."""
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers there only
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    told = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        for number, each in before.items():
            signal.signal(number, each)


def _watch(arrived: int, tell: Callable[[signal.Signals, int], str], patience: float, over: threading.Event) -> None:
    count, last = 0, -math.inf
    while number := os.read(arrived, 1)[0]:  # 0: the context is over, and all signals before are told
        apart = 0.0 if number == signal.SIGINT and not launched() else APART
        if time.monotonic() - last < apart:
            continue
        count, last = count + 1, time.monotonic()
        if patience and over.wait(patience):
            continue
        if line := tell(signal.Signals(number), count):
            say_now(line)


def say_now(line: str) -> None:
    """Write a line to stderr, whatever the main thread is writing; nothing if that is closed."""
    with suppress(OSError):
        start = "\n" if os.isatty(2) else ""  # a live line may stand there
        os.write(2, f"{start}swamla: {line}\n".encode("ascii"))
