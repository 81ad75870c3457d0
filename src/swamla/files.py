"""Write files atomically; read files only from inside their own folder."""

import errno
import hashlib
import json
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swamla.errors import CorruptError, UnsupportedPlatform, UsageError

try:
    import fcntl as fcntl  # for locks on folders and files
except ImportError:
    raise UnsupportedPlatform(
        "swamla runs on Linux and macOS: this Python has no fcntl, as on Windows; use WSL there (wsl --install)"
    ) from None

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def try_lock(handle: int, path: Path, how: int = fcntl.LOCK_EX) -> bool:
    """Lock an open file or folder, `path`, without waiting; False if another process holds the lock.

    Raises `UsageError` where the file system has no locks.
    """
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        needed = "without them two processes could write the same run; use a file system that has them"
        raise UsageError(f"{path}: its file system has no locks (flock: {error.strerror}): {needed}") from error
    return True


def fsync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text_atomically(file: Path, text: str) -> None:
    """Replace the content of `file` with `text` atomically: readers see the old or the new text."""
    staging = file.with_name(f".{file.name}.new")
    staging.write_text(text, encoding="utf-8")
    fsync(staging)
    staging.replace(file)
    fsync(file.parent)


@contextmanager
def as_new_file(file: Path) -> Iterator[None]:
    """Give the file that is written in the context the mode of any new file, by the umask.

    safetensors writes files that only their owner can read.
    """
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    yield
    file.chmod(mode)


def new_folder(parent: Path, prefix: str) -> Path:
    """A new folder in `parent`, of a name that no other has, with a mode by the umask: tempfile's is the owner's."""
    folder = parent / f"{prefix}{uuid.uuid4().hex[:12]}"
    folder.mkdir()
    return folder


def regular_file(file: Path, *, inside: Path) -> Path:
    """`file` itself. Raises `CorruptError` unless it is a regular file in `inside`, with links resolved."""
    if not file.resolve().is_relative_to(inside.resolve()):
        raise CorruptError(f"{file}: leads outside {inside} (to {file.resolve()}): refused")
    if not file.is_file():
        raise CorruptError(f"{file}: missing")
    return file


def read_json(file: Path, *, inside: Path) -> dict[str, Any]:
    """The JSON object in a file that swamla wrote. Raises `CorruptError` if it is none, and as `regular_file` does."""
    try:
        data = json.loads(regular_file(file, inside=inside).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{file}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CorruptError(f"{file}: must hold a JSON object")
    return data


def entry(data: Any, key: str, kind: type, *, file: Path) -> Any:
    """data[key], of type `kind`. Raises `CorruptError` naming `file` if it is missing or has another type."""
    found = data.get(key) if isinstance(data, dict) else None
    if not isinstance(found, kind) or isinstance(found, bool):  # a bool is an int in Python
        raise CorruptError(f'{file}: damaged: "{key}" is {found!r}, expected {_NAMES[kind]}')
    return found


_NAMES = {int: "a whole number", str: "text", dict: "a table"}
