"""Training while the text is still being read: units are encoded ahead of the rows that need them, and then dropped.

The rows of a stream are a pure function of (seed, sample index), as those of prepared data are: in every epoch the
units of the source are shuffled and taken a window at a time; the documents of a window are shuffled, packed one behind
the other, and its rows shuffled again. So the position of a run is one integer. The number of rows
of a window is kept beside its units; if it is lost, the units are encoded again, with the same result.
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
_KEPT = 2  # windows whose units stay, so that the ranks of a machine need not be quite in step


class StreamDataset(PreparedDataset):
    """A source that is encoded during training; `train` and `held_out` are those of a sample prepared beforehand.

    key: of the whole source, in the place of the fingerprint of shards that nobody has.
    """

    def __init__(self, sample: PreparedDataset, supply: "UnitSupply", window: int, key: str) -> None:
        super().__init__(
            sample.path,
            sample.meta,
            sample.tokenizer,
            throughput=sample.throughput,
            raw=sample.raw,
            plugin=sample.plugin,
        )
        self.supply, self._window = supply, window
        content = json.dumps(["stream", key, window, sample.tokenizer.fingerprint])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def rows(self, block_size: int, seed: int) -> "StreamRows":
        tokenizer = self.tokenizer
        return StreamRows(self.supply, block_size, seed, tokenizer.eos_id, tokenizer.vocab_size, self._window)

    def epochs(self) -> dict[str, int]:
        return {}  # how long the whole is shows only when it has been read

    def describe(self) -> list[tuple[str, str]]:
        units = len(self.supply.job.units)
        what = f"{units} units, shuffled {self._window} at a time; the figures here are of a sample"
        return [("stream", what), *super().describe()]


class StreamRows(BlockRows):
    """The endless training rows of a source whose units are encoded during training.

    window: units that are shuffled together.
    """

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
        """The documents of a window, shuffled, and the order of its rows. The next window is begun, old ones go."""
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
    """Encoded units of a job by their numbers, made when they are wanted; the processes start at the first of these."""

    def __init__(self, job: Job, workers: int | None = None) -> None:
        self.job = job
        self._count = workers or max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self._workers: Workers | None = None
        self._coming: dict[int, Future[UnitRecord]] = {}
        self._notes, self._noted, self._told = Notes(), set[int](), Counter[str]()

    def want(self, numbers: list[int]) -> None:
        """Begin to make those that are not there; returns at once."""
        for number in numbers:
            on_its_way = number in self._coming and not self._coming[number].done()
            if not on_its_way and not self.job.path(number).exists():
                self._workers = self._workers or Workers(self.job, self._count)
                self._coming[number] = self._workers.submit(number)

    def record(self, number: int) -> UnitRecord:
        """What a unit came to; waits for one that is not known. Raises what reading its text raised."""
        if not self.job.known(number):
            self._wait_for(number)
        record = self.job.record(number)
        if number not in self._noted:
            self._noted.add(number)
            self._tell(record.notes)
        return record

    def _tell(self, notes: dict[str, Any]) -> None:
        """Warn of what a unit left out or changed: the first time, and whenever its count has doubled since."""
        self._notes.include(notes)
        for what in notes["counts"]:
            count, places = self._notes.counts[what], notes["places"].get(what, ())
            if count >= 2 * self._told[what]:
                self._told[what] = count
                where = f", e.g. {places[-1]}" if places else ""
                if distributed.is_main():
                    warnings.warn(f"{count} {what} so far{where}", stacklevel=2)

    def split(self, number: int, vocab_size: int) -> Split:
        """The training documents of a unit; waits for one that is not there. Raises what reading its text raised."""
        while True:
            path = self._wait_for(number)
            try:
                return Split.open(path, "train", vocab_size)
            except CorruptError:
                if path.exists():  # else another process has just dropped it: once more
                    raise

    def _wait_for(self, number: int) -> Path:
        self.want([number])
        if number in self._coming:
            self._coming.pop(number).result()
        return self.job.path(number)

    def drop(self, numbers: list[int]) -> None:
        """Remove units but not what is known of them; a unit is there as a whole or not at all."""
        for number in numbers:
            with tempfile.TemporaryDirectory(prefix=".dropped-", dir=self.job.folder) as away, suppress(OSError):
                self.job.path(number).rename(Path(away) / "unit")  # another process may be faster

    def close(self) -> None:
        """End the processes."""
        if self._workers is not None:
            self._workers.close()


@dataclass(frozen=True)
class StreamPlan:
    """sample: the fingerprint of the prepared sample.  key: of the whole, as long as nobody changes it.

    names: of the source's files.  units: of its text.
    """

    sample: str
    key: str
    names: tuple[str, ...]
    units: tuple[Unit, ...]

    @classmethod
    def of(cls, source: Source, units: list[Unit], sample: str) -> "StreamPlan":
        """The plan of a stream that begins now."""
        key = json.dumps([sample, [entry.size for entry in source.entries], len(units)])
        return cls(sample, key, tuple(entry.name for entry in source.entries), tuple(units))

    def write(self, folder: Path) -> None:
        """Keep the plan beside its units."""
        plain = {"sample": self.sample, "key": self.key, "names": self.names, "units": self.units}
        write_text_atomically(folder / FILE, json.dumps(plain))

    @classmethod
    def read(cls, folder: Path) -> "StreamPlan":
        """The plan kept in `folder`. CorruptError if it cannot be read."""
        plain = read_json(folder / FILE, inside=folder)
        try:
            units = (Unit(first, stop, span and (span[0], span[1])) for first, stop, span in plain["units"])
            return cls(plain["sample"], plain["key"], tuple(plain["names"]), tuple(units))
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"{folder / FILE}: damaged ({error!r}); delete {folder}") from error

    def units_of(self, source: Source) -> tuple[Unit, ...]:
        """The units, whose last spans reach to the end of files that grew. DataError if there are other files now."""
        names = tuple(entry.name for entry in source.entries)
        if names != self.names:
            other = sorted(set(names) ^ set(self.names))[:3]
            raise DataError(
                f"{source.name}: files came or went since the run began ({', '.join(other)}): what is streamed needs "
                "the same files; restore them, or start a new run"
            )
        last = {unit.first: unit for unit in self.units if unit.span}
        return tuple(_to_the_end(unit, source) if last.get(unit.first) is unit else unit for unit in self.units)


def _to_the_end(unit: Unit, source: Source) -> Unit:
    return unit if unit.span is None else unit._replace(span=source.last_span(source.entries[unit.first], unit.span))
