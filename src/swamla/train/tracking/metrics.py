"""A run's metrics.jsonl."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swamla.errors import CorruptError
from swamla.files import write_text_atomically


class Metrics:
    """Appends JSON records to a file, one a line, each with the step it belongs to."""

    def __init__(self, file: Path) -> None:
        self._stream = file.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a record; infinities and NaN, which JSON lacks, become null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._stream.write(json.dumps({"step": step, **clean}) + "\n")

    def sync(self) -> None:
        """Flush all records to the disk."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def drop_records_after(file: Path, step: int) -> None:
    """Remove the records after `step`, if the file exists. Raises as `read_metrics` does."""
    if file.exists():
        kept = [record for record in read_metrics(file) if record["step"] <= step]
        write_text_atomically(file, "".join(json.dumps(record) + "\n" for record in kept))


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, without a last line truncated by a crash.

    Raises `CorruptError` naming any other line that is not a record.
    """
    lines = file.read_bytes().split(b"\n")
    return [_record(line, f"{file}:{number}") for number, line in enumerate(lines[:-1], 1) if line]


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise CorruptError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise CorruptError(f"{where}: not a record with its step")
    return record
