"""Choose the files of a folder that are read as training text."""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Literal

from swamla.data.reading import COMPRESSED, Notes
from swamla.errors import DataError

_SPLIT = re.compile(
    r"(?<![a-z])(train|training|test|testing|valid|validation|val|dev|eval|held_?out)([_-]?set)?(?![a-z])",
    re.IGNORECASE,
)
_OF_DATA = re.compile(
    rf"\.(txt|jsonl|ndjson|jsonlines|jl|json|csv|tsv|parquet)({'|'.join(map(re.escape, COMPRESSED))})?$", re.IGNORECASE
)


def walk(root: Path, notes: Notes) -> list[tuple[str, Path]]:
    """(name relative to `root`, path) of every file under `root`, sorted; counts in `notes` what it leaves out.

    Links are followed, and a target of several links is read once. Left out are hidden files, runs and caches of
    swamla, and other splits: names that would equal a neighbour's with "test" or "valid" in place of "train".
    """
    found: list[tuple[str, Path]] = []
    links: list[tuple[str, Path]] = []
    seen = {_identity(root)}
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{folder}: cannot be read ({error.strerror or error})") from error
        inside = {entry.name for entry in entries}
        if {"config.json", "checkpoints"} <= inside or {"meta.json", "train.tokens.npy"} <= inside:
            notes.add("runs and caches of swamla left out", folder)
            continue
        others = _other_splits(entries)
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith("."):
                notes.add("hidden files and folders left out", path)
            elif entry.name in others:
                notes.add("files and folders of other splits left out", path)
            elif _is(entry, "dir"):
                if _identity(path) in seen:
                    notes.add("links to folders that are read already left out", path)
                else:
                    seen.add(_identity(path))
                    waiting.append(path)
            elif _is(entry, "file"):
                (links if entry.is_symlink() else found).append((path.relative_to(root).as_posix(), path))
            else:
                notes.add("broken links, pipes and devices left out", path)
    read = {_identity(path) for _, path in found} if links else set()
    for name, path in sorted(links):
        if _identity(path) in read:
            notes.add("links to files that are read already left out", path)
        else:
            read.add(_identity(path))
            found.append((name, path))
    return sorted(found)


def _is(entry: os.DirEntry[str], what: Literal["file", "dir"]) -> bool:
    with suppress(OSError):  # a link to itself
        return entry.is_dir() if what == "dir" else entry.is_file()
    return False


def _identity(path: Path) -> tuple[int, int]:
    return (stat := path.stat()).st_dev, stat.st_ino


def _other_splits(entries: list[os.DirEntry[str]]) -> set[str]:
    """Names that equal the name of a training split, except for the split, digits and the file type."""
    of_data = [entry.name for entry in entries if _is(entry, "dir") or _OF_DATA.search(entry.name)]
    splits = {name: (found[1].lower(), _likeness(name)) for name in of_data if (found := _SPLIT.search(name))}
    train = {likeness for split, likeness in splits.values() if split.startswith("train")}
    return {name for name, (split, likeness) in splits.items() if not split.startswith("train") and likeness in train}


def _likeness(name: str) -> str:
    return re.sub(r"\d+", "0", _SPLIT.sub("*", _OF_DATA.sub("", name), count=1))
