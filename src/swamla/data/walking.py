"""The files under a folder that are its text, and what is left out, each with its reason."""

import os
import re
from pathlib import Path

from swamla.data.notes import Notes
from swamla.data.reading import COMPRESSED
from swamla.errors import DataError

_SPLIT = re.compile(r"(?<![a-z])(train|training|test|testing|valid|validation|val|dev|eval|held_?out)(?![a-z])", re.I)
_OF_DATA = re.compile(
    rf"\.(txt|jsonl|ndjson|json|csv|tsv|parquet)({'|'.join(map(re.escape, COMPRESSED))})?$", re.IGNORECASE
)


def walk(root: Path, notes: Notes) -> list[tuple[str, Path]]:
    """(name relative to `root`, path) of every file under `root`, sorted; what is left out is counted in `notes`.

    Links are followed, and a folder is read once however many lead to it. Left out are what is hidden, runs and caches
    of swamla, and, beside what is called "train", what is alike but called "test" or "valid". DataError for a folder
    that cannot be listed.
    """
    found: list[tuple[str, Path]] = []
    seen = {_identity(root)}
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        entries = _listed(folder)
        if _is_ours(entries):
            notes.add("runs and caches of swamla left out", folder)
            continue
        others = _other_splits(entries)
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith("."):
                notes.add("hidden files and folders left out", path)
            elif entry.name in others:
                notes.add("files and folders of other splits left out", path)
            elif entry.is_dir():
                if _identity(path) in seen:
                    notes.add("links to folders that are read already left out", path)
                else:
                    seen.add(_identity(path))
                    waiting.append(path)
            elif entry.is_file():
                found.append((path.relative_to(root).as_posix(), path))
            else:
                notes.add("broken links, pipes and devices left out", path)
    return sorted(found)


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror or error})") from error


def _identity(folder: Path) -> tuple[int, int]:
    stat = folder.stat()
    return stat.st_dev, stat.st_ino


def _is_ours(entries: list[os.DirEntry[str]]) -> bool:
    """Whether a folder is a run, or holds prepared data."""
    names = {entry.name for entry in entries}
    return {"config.json", "checkpoints"} <= names or {"meta.json", "train.tokens.npy"} <= names


def _other_splits(entries: list[os.DirEntry[str]]) -> set[str]:
    """Names that are like one of a training split, numbers aside, but for the split's name."""
    of_data = [entry.name for entry in entries if entry.is_dir() or _OF_DATA.search(entry.name)]
    splits = {name: (found[1].lower(), _likeness(name)) for name in of_data if (found := _SPLIT.search(name))}
    train = {likeness for split, likeness in splits.values() if split.startswith("train")}
    return {name for name, (split, likeness) in splits.items() if not split.startswith("train") and likeness in train}


def _likeness(name: str) -> str:
    return re.sub(r"\d+", "0", _SPLIT.sub("*", name, count=1))
