"""Streaming: units are encoded during training, ahead of the rows that need them, and deleted afterwards.

The rows of a stream are a pure function of (seed, sample index), like those of prepared data. In every epoch the units
of the source are shuffled and divided into windows; the documents of a window are shuffled and concatenated into rows,
and the rows are shuffled. So the position of a run is one integer. The records of deleted units, which give the number
of rows of a window, are kept; a lost one is restored by encoding its unit again, with the same result.
"""

import hashlib
import json
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from swamla import distributed
from swamla.data.dataset import PreparedDataset
from swamla.data.packing import Batch, BlockRows, DocumentStream, pad, permutation
from swamla.data.reading import Notes
from swamla.data.shards import Split, join_splits
from swamla.data.sources import Source, Unit
from swamla.data.units import Job, UnitRecord, Workers, available_cores
from swamla.errors import CorruptError, DataError
from swamla.files import read_json, write_text_atomically

FILE = "stream.json"

_UNITS, _DOCUMENTS, _ROWS = 2, 0, 1
_KEPT = 2  # windows whose units are kept, since the ranks of a machine may be a window apart


class StreamDataset(PreparedDataset):
    """A source that is encoded during training; `train` and `held_out` are those of a sample prepared beforehand.

    key: identifies the whole source, whose shards never exist at once and so have no fingerprint.
    """

    def __init__(self, sample: PreparedDataset, supply: "UnitSupply", window: int, key: str) -> None:
        super().__init__(
            sample.path, sample.meta, sample.tokenizer, throughput=sample.throughput, made_of=sample.made_of
        )
        self.supply, self._window = supply, window
        content = json.dumps(["stream", key, window, sample.tokenizer.fingerprint])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def rows(self, block_size: int, seed: int) -> "StreamRows":
        tokenizer = self.tokenizer
        return StreamRows(self.supply, block_size, seed, tokenizer.eos_id, tokenizer.vocab_size, self._window)

    def epochs(self) -> dict[str, int]:
        return {}  # the length is unknown until the whole source has been read

    def describe(self) -> list[tuple[str, str]]:
        units = len(self.supply.job.units)
        what = f"{units} units, shuffled {self._window} at a time; the figures here are of a sample"
        return [("stream", what), *super().describe()]


class StreamRows(BlockRows):
    """The endless training rows of a stream. window: how many units are shuffled together."""

    def __init__(
        self, supply: "UnitSupply", block_size: int, seed: int, eos_id: int, vocab_size: int, window: int
    ) -> None:
        super().__init__(block_size, seed)
        self._supply, self._eos_id, self._vocab_size, self._window = supply, eos_id, vocab_size, window
        self._n_units = len(supply.job.units)
        self._windows = -(-self._n_units // window)  # in an epoch
        self._stream: Callable[[int], tuple[DocumentStream, np.ndarray]] = lru_cache(2)(self._open)

    def units(self, block: int) -> list[int]:
        """The units of a window."""
        epoch, place = divmod(block, self._windows)
        order = permutation(self._n_units, self.seed, epoch, _UNITS)
        return order[place * self._window : (place + 1) * self._window].tolist()

    def n_rows(self, block: int) -> int:
        numbers = self.units(block)
        self._supply.want([number for number in numbers if not self._supply.job.known(number)])
        records = [self._supply.record(number) for number in numbers]
        return -(-sum(record.train_tokens + record.train for record in records) // self.block_size)

    def rows(self, block: int, row: np.ndarray) -> Batch:
        stream, order = self._stream(block)
        start_B = order[row] * self.block_size
        return pad(stream.rows(start_B, self.block_size), stream.epoch_length - start_B)

    def _open(self, block: int) -> tuple[DocumentStream, np.ndarray]:
        """The shuffled documents of a window and the order of its rows. Starts the next window, deletes old ones."""
        numbers = self.units(block)
        self._supply.want(numbers)
        split = join_splits([self._supply.split(number, self._vocab_size) for number in numbers])
        self._supply.want(self.units(block + 1))
        recent = {number for near in range(max(0, block - _KEPT + 1), block + 2) for number in self.units(near)}
        self._supply.drop([number for number in self._supply.job.present() if number not in recent])
        stream = DocumentStream(
            split, self._eos_id, lambda _: permutation(split.n_documents, self.seed, block, _DOCUMENTS)
        )
        return stream, permutation(self.n_rows(block), self.seed, block, _ROWS)


class UnitSupply:
    """Encodes the units of a job on request, in worker processes that start with the first request."""

    def __init__(self, job: Job, workers: int | None = None) -> None:
        self.job = job
        self._count = workers or max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self._workers: Workers | None = None
        self._coming: dict[int, Future[UnitRecord]] = {}
        self._notes, self._noted, self._told = Notes(), set[int](), Counter[str]()

    def want(self, numbers: list[int]) -> None:
        """Start to encode those that are missing, without waiting."""
        for number in numbers:
            is_coming = number in self._coming and not self._coming[number].done()
            if not is_coming and not self.job.path(number).exists():
                self._workers = self._workers or Workers(self.job, self._count)
                self._coming[number] = self._workers.submit(number)

    def record(self, number: int) -> UnitRecord:
        """The record of a unit; waits for one that is not encoded yet, and raises what its encoding raised."""
        if not self.job.known(number):
            self._wait_for(number)
        record = self.job.record(number)
        if number not in self._noted:
            self._noted.add(number)
            self._tell(record.notes)
        return record

    def _tell(self, notes: dict[str, Any]) -> None:
        """Warn of what was left out or changed: at the first count, and whenever the count has doubled."""
        self._notes.include(notes)
        for what in notes["counts"]:
            count, places = self._notes.counts[what], notes["places"].get(what, ())
            if count >= 2 * self._told[what]:
                self._told[what] = count
                where = f", e.g. {places[-1]}" if places else ""
                if distributed.is_main():
                    warnings.warn(f"{count} {what} so far{where}", stacklevel=2)

    def split(self, number: int, vocab_size: int) -> Split:
        """The training documents of a unit; waits for one that is missing, and raises what its encoding raised."""
        while True:
            path = self._wait_for(number)
            try:
                return Split.open(path, "train", vocab_size)
            except CorruptError:
                if path.exists():  # else another process has just deleted it: encode it again
                    raise

    def _wait_for(self, number: int) -> Path:
        self.want([number])
        if number in self._coming:
            self._coming.pop(number).result()
        return self.job.path(number)

    def drop(self, numbers: list[int]) -> None:
        """Delete units but not their records; each is renamed first, so that no process reads a part of it."""
        for number in numbers:
            with tempfile.TemporaryDirectory(prefix=".dropped-", dir=self.job.folder) as away, suppress(OSError):
                self.job.path(number).rename(Path(away) / "unit")  # another process may be faster

    def close(self) -> None:
        """End the processes."""
        if self._workers is not None:
            self._workers.close()


@dataclass(frozen=True)
class StreamPlan:
    """The division of a stream into units, stored so that a resumed run has the same rows.

    sample: the fingerprint of the prepared sample.  key: identifies the whole source.  names: of the source's files.
    """

    sample: str
    key: str
    names: tuple[str, ...]
    units: tuple[Unit, ...]

    @classmethod
    def of(cls, source: Source, units: list[Unit], sample: str) -> "StreamPlan":
        """The plan of a new stream."""
        key = json.dumps([sample, [entry.size for entry in source.entries], len(units)])
        return cls(sample, key, tuple(entry.name for entry in source.entries), tuple(units))

    def write(self, folder: Path) -> None:
        """Store the plan in the folder of its units."""
        plain = {"sample": self.sample, "key": self.key, "names": self.names, "units": self.units}
        write_text_atomically(folder / FILE, json.dumps(plain))

    @classmethod
    def read(cls, folder: Path) -> "StreamPlan":
        """The plan stored in `folder`. CorruptError if it cannot be read."""
        plain = read_json(folder / FILE, inside=folder)
        try:
            units = (Unit(first, stop, span and (span[0], span[1])) for first, stop, span in plain["units"])
            return cls(plain["sample"], plain["key"], tuple(plain["names"]), tuple(units))
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"{folder / FILE}: damaged ({error!r}); delete {folder}") from error

    def units_of(self, source: Source) -> tuple[Unit, ...]:
        """The units, the last one of a file extended if the file grew. DataError if files were added or removed."""
        names = tuple(entry.name for entry in source.entries)
        if names != self.names:
            other = sorted(set(names) ^ set(self.names))[:3]
            raise DataError(
                f"{source.name}: files were added or removed since the run began ({', '.join(other)}): a stream needs "
                "the same files; restore them, or start a new run"
            )
        last = {unit.first: unit for unit in self.units if unit.span}
        return tuple(
            unit._replace(span=source.last_span(source.entries[unit.first], unit.span))
            if unit.span and last[unit.first] is unit
            else unit
            for unit in self.units
        )
