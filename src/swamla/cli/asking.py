"""Removal of folders and files that the user names: asked about first, links never followed."""

import os
import shutil
import sys
from pathlib import Path

from swamla.errors import UsageError


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder, links not followed."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(os.lstat(os.path.join(folder, name)).st_size for folder, _, names in os.walk(path) for name in names)


def confirmed(question: str, *, yes: bool) -> bool:
    """Whether the user agrees. yes: without being asked. Raises `UsageError` if there is nobody to ask."""
    if yes:
        return True
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError(f"{question} There is no terminal to answer on: add --yes")
    print(f"{question} [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def remove(path: Path) -> None:
    """Delete a file or a folder; a folder is renamed first, so that a part of it is never taken for the whole."""
    if not path.is_dir():
        path.unlink()
        return
    doomed = path.with_name(f".deleting-{path.name}-{os.getpid()}")
    path.rename(doomed)
    shutil.rmtree(doomed)
