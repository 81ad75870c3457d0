"""Encoded units on disk: each in a folder of its own that appears whole or not at all, whoever makes it."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swamla.data.encode import Progress, encode_documents
from swamla.data.held_out import is_held_out
from swamla.data.notes import Notes
from swamla.data.sources import Source
from swamla.data.tokenizer import Tokenizer
from swamla.data.units import Unit, unit_documents
from swamla.errors import CorruptError
from swamla.files import fcntl, fsync, read_json, sha256_of, write_text_atomically


@dataclass(frozen=True, kw_only=True)
class UnitRecord:
    """What a unit came to.

    train, held_out: documents of each split.  train_tokens: of one.  tokens, bytes: of both.  lossless: the held-out
    ones decode to exactly their text.  tokenizer: its fingerprint.  notes: of reading, as `Notes.plain`.  files: size
    and SHA-256 of each.
    """

    train: int
    held_out: int
    train_tokens: int
    tokens: int
    bytes: int
    lossless: bool
    tokenizer: str
    notes: dict[str, Any]
    files: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """Units to be encoded: where from, where to, and which documents are held out."""

    source: Source
    units: tuple[Unit, ...]
    folder: Path
    held_out_fraction: float

    def path(self, number: int) -> Path:
        """The folder of a unit."""
        return self.folder / f"unit-{number:06d}"

    def known(self, number: int) -> bool:
        """Whether it is on record what the unit came to, be it there or not."""
        return self.record_path(number).exists()

    def present(self) -> list[int]:
        """The units whose files are there."""
        return [int(path.name.removeprefix("unit-")) for path in self.folder.glob("unit-*") if not path.suffix]

    def missing(self) -> list[int]:
        """The units that nobody has made yet."""
        return [number for number in range(len(self.units)) if not self.path(number).exists()]

    def record(self, number: int) -> UnitRecord:
        """What a unit that was made came to. CorruptError if it cannot be read."""
        path = self.record_path(number)
        try:
            return UnitRecord(**read_json(path, inside=path.parent))
        except TypeError as error:
            raise CorruptError(f"{path}: damaged ({error}); delete {path} and {self.path(number)}") from error

    def record_path(self, number: int) -> Path:
        """Beside the unit's folder: a stream drops units and keeps what is known of them."""
        return self.folder / f"unit-{number:06d}.json"


def make_unit(job: Job, tokenizer: Tokenizer, number: int) -> UnitRecord:
    """Encode a unit, unless it is there. Whoever makes it, it is byte for byte the same."""
    with _turn(job.folder / f"unit-{number:06d}.lock"):
        if job.path(number).exists() and job.known(number):
            return job.record(number)
        return _make(job, tokenizer, number)


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """One after the other on this machine; file systems that cannot lock let all in, which is only slower."""
    with path.open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(job: Job, tokenizer: Tokenizer, number: int) -> UnitRecord:
    staging = Path(tempfile.mkdtemp(prefix=".unit-", dir=job.folder))
    try:
        notes = Notes()
        documents = unit_documents(job.source, job.units[number], notes)
        divided = ((text, is_held_out(text, job.held_out_fraction)) for text in documents)
        encoded = encode_documents(divided, tokenizer, staging, _silent)
        record = UnitRecord(
            **encoded._asdict(), tokenizer=tokenizer.fingerprint, notes=notes.plain(), files=files_of(staging)
        )
        for path in staging.iterdir():
            fsync(path)
        write_text_atomically(job.record_path(number), json.dumps(asdict(record)))  # the unit is there once it is moved
        try:
            staging.rename(job.path(number))
        except OSError:
            if not job.path(number).exists():
                raise
        fsync(job.folder)
        return record
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def files_of(folder: Path, but: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file in `folder`."""
    paths = sorted(path for path in folder.iterdir() if path.name not in but)
    return {path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in paths}


def verify_unit(path: Path, record: UnitRecord) -> None:
    """Raise CorruptError naming the file that is not what was written."""
    for name, entry in record.files.items():
        file = path / name
        if not file.is_file() or os.path.getsize(file) != entry["size"] or sha256_of(file) != entry["sha256"]:
            raise CorruptError(f"{file}: damaged or missing; delete {path} to have it made again")


def _silent(stage: str, documents: int, n_bytes: int) -> None:
    pass


silent: Progress = _silent
