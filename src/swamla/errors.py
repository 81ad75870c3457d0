"""Errors that a user can mend: a one-line message and the exit status of the program."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class SwamlaError(Exception):
    """Base of every error whose message is written for the user; the command line prints it without a traceback."""

    exit_status = 2


class ConfigError(SwamlaError, ValueError):
    """An invalid setting: `train.lr = -1 (run.toml:12): must be > 0, e.g. 3e-4`."""

    def __init__(self, field: str, got: Any, allowed: str, origin: str = "") -> None:
        self.field, self.got, self.allowed, self.origin = field, got, allowed, origin
        where = f" ({origin})" if origin else ""
        super().__init__(f"{field} = {got!r}{where}: {allowed}")


class UsageError(SwamlaError, ValueError):
    """A request that makes no sense as asked: unknown recipe, empty prompt, resume of nothing."""


class DataError(SwamlaError, ValueError):
    """Unusable input data: names the file, the place in it, and how to mend it."""


class HubDataError(DataError):
    """A dataset or a tokenizer that could not be fetched from the hub: no network, or the hub has no such thing."""


class MissingBackendError(SwamlaError):
    """A backend or an optional library that is not installed: says the install command."""


class UnsupportedPlatform(SwamlaError, ImportError):
    """A system that swamla does not run on."""


class CorruptError(SwamlaError):
    """An artefact (checkpoint, shard) that is damaged: truncated, missing parts, wrong checksum."""

    exit_status = 3


class Interrupted(SwamlaError):
    """The run was asked to stop, saved its state and can be resumed (75 after SIGTERM, 130 after Ctrl-C)."""

    def __init__(self, message: str, exit_status: int = 75) -> None:
        super().__init__(message)
        self.exit_status = exit_status


def require(condition: bool, field: str, got: Any, allowed: str) -> None:
    """Raise `ConfigError` unless `condition` holds; `allowed` says what would be accepted, with an example."""
    if not condition:
        raise ConfigError(field, got, allowed)


class OutOfMemory(SwamlaError):
    """Training ran out of memory; the notes name settings that need less."""


def is_out_of_memory(error: BaseException) -> bool:
    """True for out-of-memory errors; torch has no class for those of the CPU, only a message."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


class FailedElsewhere(SwamlaError):
    """Another process of the run failed and reports the reason itself."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


# Of what a library raises these are passed on; a panic of Rust code is no `Exception`, and prints a page.
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
