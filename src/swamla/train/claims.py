"""Locks on run folders: one process at a time trains in a folder, and locks it at the start of its command."""

import json
import os
import shutil
import time
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from swamla.checkpoint import list_checkpoints
from swamla.errors import UsageError
from swamla.files import fcntl, try_lock

# What a run writes before its first checkpoint; without a checkpoint it cannot be resumed.
_BEFORE_A_CHECKPOINT = {
    *("config.json", ".config.json.new", "tokenizer.json", "launch.json", ".launch.json.new", "metrics.jsonl"),
    *(
        "initialized_from.json",
        ".initialized_from.json.new",
        "data.json",
        ".data.json.new",
        "samples.txt",
        "checkpoints",
        "tensorboard",
        "wandb",
    ),
}
_KEPT = "profile"  # traces, which may show why the run ended; never deleted with an unsaved run
RUN_FILES = {*_BEFORE_A_CHECKPOINT, _KEPT, "loss.png", "resumed_from_hub.json"}  # all that a run's folder has


class Claim:
    """A lock on a folder to train in, until `release`; the system releases it however the process ends.

    made: the folders, innermost first, that were created for it; `release` removes those that are still empty.
    """

    def __init__(self, path: Path, lock: int, made: list[Path]) -> None:
        self.path, self._lock, self._made = path, lock, made

    def own(self) -> None:
        """Treat the folder as created for this claim."""
        if self.path not in self._made:
            self._made.insert(0, self.path)

    def release(self) -> None:
        """Let other processes train in the folder."""
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:  # not empty
                break
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def claim_new(folder: Path) -> Claim:
    """Lock the folder of a new run, which is created if it does not exist.

    Raises `UsageError` if another process trains in it, or if it holds anything but a run that ended before its first
    checkpoint.
    """
    require_free(folder)
    claim = _try(folder)
    try:
        require_free(folder)  # another run may have started and ended meanwhile
    except UsageError:
        claim.release()
        raise
    return claim


def claim_numbered(folder: Path) -> Claim:
    """Lock `folder`, or the first of folder-2, folder-3 … that does not exist, or is empty after a killed start."""
    for candidate in (folder if n == 1 else folder.with_name(f"{folder.name}-{n}") for n in count(1)):
        if candidate.exists() and not _is_empty(candidate):
            continue
        try:
            claim = _try(candidate)
        except UsageError:
            continue
        if _is_empty(candidate):
            claim.own()  # another start, at the same time or killed, created it and left it empty
            return claim
        claim.release()
    raise AssertionError("unreachable: the numbers never end")


def claim_run(folder: Path) -> Claim:
    """Lock the folder of a run to resume. Raises `UsageError` if it holds no run, or another process trains in it."""
    if not (folder / "config.json").exists():
        raise UsageError(f"{folder}: nothing to resume (it has no config.json)")
    return _try(folder)


def claim_to_remove(folder: Path) -> Claim:
    """Lock the folder of a run that is to be deleted. Raises `UsageError` if another process trains in it."""
    return _try(folder)


def is_running(run_dir: Path) -> bool:
    """True while a process has locked the folder."""
    folder = os.open(run_dir, os.O_RDONLY)
    try:
        return not try_lock(folder, run_dir, fcntl.LOCK_SH)
    finally:
        os.close(folder)


def require_free(folder: Path) -> None:
    """Raise `UsageError` if a file, or a folder with anything but an unsaved run, is in the way of a new run."""
    if folder.exists() and not (_is_empty(folder) or is_unsaved(folder)):
        raise UsageError(f"{folder}: exists and is not empty: choose another folder, or continue it with `resume`")


def is_unsaved(folder: Path) -> bool:
    """True if the folder holds only a run that ended before its first checkpoint.

    Other programs may write files of the same names, so the content of config.json and data.json is checked too.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not names >= {"config.json", "data.json"} or not names <= {*_BEFORE_A_CHECKPOINT, _KEPT}:
        return False
    config, identity = (_plain(folder / name) for name in ("config.json", "data.json"))
    if not isinstance(config, dict) or not config.keys() >= {"format_version", "model", "data", "train"}:
        return False
    ours = isinstance(identity, list) and all(isinstance(each, dict) for each in identity)
    if not ours or any(each.keys() - {"plugin"} != {"fingerprint", "raw"} for each in identity):
        return False
    checkpoints = folder / "checkpoints"
    return not list_checkpoints(checkpoints) and not any(checkpoints.glob("damaged-*"))


def _plain(file: Path) -> Any:
    """The content of a JSON file; None if it is not JSON."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def remove_unsaved(folder: Path) -> None:
    """Delete the files of a run that ended before its first checkpoint, except its traces."""
    for path in [path for path in folder.iterdir() if path.name in _BEFORE_A_CHECKPOINT]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _try(folder: Path) -> Claim:
    """Lock the folder, whatever is in it. Raises `UsageError` if another process has locked it."""
    for wait in (0.05, 0.0):  # try twice: `is_running` locks for a moment, and a folder may be removed meanwhile
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        if try_lock(lock, folder) and _is_still(folder, lock):
            return Claim(folder, lock, made)
        os.close(lock)
        time.sleep(wait)
    raise UsageError(f"{folder}: another process is training in it: wait for it, or stop it first")


def _is_still(folder: Path, opened: int) -> bool:
    """False if the opened folder is no longer the one of that name, because another process removed it."""
    try:
        return os.path.samestat(os.fstat(opened), os.stat(folder))
    except FileNotFoundError:
        return False


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())
