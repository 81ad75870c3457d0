"""Errors that a user can fix: a one-line message and the exit status of the program."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class SwamlaError(Exception):
    """Base of every error whose message is written for the user; the command line prints it without a traceback."""

    exit_status = 2


class ConfigError(SwamlaError, ValueError):
    """An invalid setting: `train.lr = -1 (run.toml:12): must be > 0, e.g. 3e-4`.

    kind: of the config that has the field, "" if it has none. `allowed` names other settings of that config by their
    names alone, and of others with the section. Any message names a setting `name = value`, or `name` in backquotes:
    the command line puts its flags there (`swamla.cli.spelling`).
    """

    def __init__(self, field: str, got: Any, allowed: str, origin: str = "", kind: str = "") -> None:
        self.field, self.got, self.allowed, self.origin, self.kind = field, got, allowed, origin, kind
        where = f" ({origin})" if origin else ""
        super().__init__(f"{field} = {got!r}{where}: {allowed}")


class UsageError(SwamlaError, ValueError):
    """An impossible request: an unknown recipe, an empty prompt, nothing to resume."""


class DataError(SwamlaError, ValueError):
    """Unusable input data: names the file, the place in it, and how to fix it."""


class HubDataError(DataError):
    """A dataset or a tokenizer that could not be fetched from the hub: no network, or the hub has no such thing."""


class MissingBackendError(SwamlaError):
    """A backend or an optional library that is not installed: says the install command."""


class UnsupportedPlatform(SwamlaError, ImportError):
    """An operating system that swamla does not support."""


class CorruptError(SwamlaError):
    """A damaged artefact (checkpoint, shard): truncated, incomplete, or with a wrong checksum."""

    exit_status = 3


class Interrupted(SwamlaError):
    """The run was asked to stop, saved its state and can be resumed (75 after SIGTERM, 130 after Ctrl-C)."""

    def __init__(self, message: str, exit_status: int = 75) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class LeftAtOnce(KeyboardInterrupt):
    """A second SIGTERM ended the run without waiting for its save."""

    def __init__(self, number: int) -> None:
        super().__init__("left at once, nothing more was saved")
        self.exit_status = 128 + number


def require(condition: bool, field: str, got: Any, allowed: str) -> None:
    """Raise `ConfigError` unless `condition` holds; `allowed` says what would be accepted, with an example."""
    if not condition:
        raise ConfigError(field, got, allowed)


class OutOfMemory(SwamlaError):
    """Training ran out of memory; the notes name settings that need less."""


def is_out_of_memory(error: BaseException) -> bool:
    """True for out-of-memory errors. torch has a class for those of CUDA, but only a message for those of the CPU."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


class FailedElsewhere(SwamlaError):
    """Another process of the run failed and reports the reason itself."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


# Errors that `foreign` passes on. A panic of Rust code is a `BaseException`, so that class is caught.
_PASSED_ON = (SwamlaError, OSError, EOFError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit)


@contextmanager
def foreign(error: type[SwamlaError], what: str) -> Iterator[None]:
    """Turn what a library raises, panics included, into `error`: `what`, then the first line of its message."""
    try:
        yield
    except _PASSED_ON:
        raise
    except BaseException as raised:
        line = (str(raised).strip().splitlines() or [type(raised).__name__])[0]
        raise error(f"{what} ({line})") from raised


@contextmanager
def without_stderr() -> Iterator[None]:
    """Context that discards the process's standard error, where a panic of Rust code prints 40 lines."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
