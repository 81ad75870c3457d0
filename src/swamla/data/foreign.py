"""Calls of libraries that fail in ways of their own: a panic of Rust code is no `Exception`, and prints a page."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from swamla.errors import SwamlaError

_NOT_THEIRS = (SwamlaError, OSError, EOFError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit)


@contextmanager
def foreign(error: type[SwamlaError], what: str) -> Iterator[None]:
    """Turn whatever a library raises, panics included, into `error`: `what`, and in brackets its own first line."""
    try:
        yield
    except _NOT_THEIRS:
        raise
    except BaseException as raised:
        line = (str(raised).strip().splitlines() or [type(raised).__name__])[0]
        raise error(f"{what} ({line})") from raised


@contextmanager
def without_stderr() -> Iterator[None]:
    """Nothing that is written to the process's standard error is seen: a panic tells its story there, in 40 lines."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
