"""Large sources: units are encoded by several processes, each into a folder of its own, and joined into a dataset.

A unit's folder is written atomically. Its content, and so the dataset's, is the same for any number of processes.
"""

import json
import os
import pickle
import queue
import shutil
import subprocess
import sys
import traceback
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from swamla.data.config import DataConfig
from swamla.data.dataset import TOKENIZER, files_of, write_meta
from swamla.data.reading import Notes
from swamla.data.shards import HELD_OUT_TEXT, Encoded, SplitWriter, encode_documents, is_held_out, rule_for_many
from swamla.data.sources import Source, Unit
from swamla.data.tokenizer import Tokenizer, load_tokenizer
from swamla.errors import CorruptError, DataError, MissingBackendError, SwamlaError
from swamla.files import fcntl, fsync, new_folder, read_json, sha256_of, write_text_atomically
from swamla.plugins import load_plugin, plugin_file

_ONE_CORE = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True, kw_only=True)
class UnitRecord:
    """The record of an encoded unit.

    train, held_out: numbers of documents.  train_tokens: of the training split.  tokens, bytes: of both splits.
    lossless: the held-out tokens decode to exactly their text.  tokenizer: its fingerprint.  notes: of reading, as
    `Notes.plain`.  files: size and SHA-256 of each.
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
    """The encoding of units: their source, the folder of the results, and the fraction of held-out documents.

    The folder has the tokenizer, and for each unit a subfolder with its shards and a file with its record. A stream
    deletes the shards of units and keeps the records.
    """

    source: Source
    units: tuple[Unit, ...]
    folder: Path
    held_out_fraction: float

    def path(self, number: int) -> Path:
        """The folder of a unit."""
        return self.folder / f"unit-{number:06d}"

    def known(self, number: int) -> bool:
        """Whether the unit has a record, even if its shards were deleted."""
        return self._record(number).exists()

    def present(self) -> list[int]:
        """The units whose shards exist."""
        return [int(path.name.removeprefix("unit-")) for path in self.folder.glob("unit-*") if not path.suffix]

    def missing(self) -> list[int]:
        """The units whose shards do not exist."""
        return [number for number in range(len(self.units)) if not self.path(number).exists()]

    def record(self, number: int) -> UnitRecord:
        """The record of an encoded unit. CorruptError if it cannot be read."""
        path = self._record(number)
        try:
            return UnitRecord(**read_json(path, inside=path.parent))
        except TypeError as error:
            raise CorruptError(f"{path}: damaged ({error}); delete {path} and {self.path(number)}") from error

    def make(self, tokenizer: Tokenizer, number: int) -> UnitRecord:
        """Encode a unit, unless its shards exist."""
        with _exclusive(self.folder / f"unit-{number:06d}.lock"):
            if self.path(number).exists() and self.known(number):
                return self.record(number)
            staging = new_folder(self.folder, ".unit-")
            try:
                return self._encode(tokenizer, number, staging)
            finally:
                shutil.rmtree(staging, ignore_errors=True)

    def _encode(self, tokenizer: Tokenizer, number: int, staging: Path) -> UnitRecord:
        notes = Notes()
        documents = self.source.unit_documents(self.units[number], notes)
        divided = ((text, is_held_out(text, self.held_out_fraction)) for text in documents)
        encoded = encode_documents(divided, tokenizer, staging, lambda *_: None)
        record = UnitRecord(
            **encoded._asdict(), tokenizer=tokenizer.fingerprint, notes=notes.plain(), files=files_of(staging)
        )
        for path in staging.iterdir():
            fsync(path)
        # Before the rename, after which the unit counts as encoded.
        write_text_atomically(self._record(number), json.dumps(asdict(record)))
        try:
            staging.rename(self.path(number))
        except OSError:
            if not self.path(number).exists():
                raise
        fsync(self.folder)
        return record

    def join(self, folder: Path, config: DataConfig, tokenizer: Tokenizer) -> int:
        """Join all units to a dataset in `folder`; returns its number of documents.

        Checks every byte of the units. For a single document nothing is written: it has to be cut in two.
        """
        paths = [self.path(number) for number in range(len(self.units))]
        records = [self.record(number) for number in range(len(self.units))]
        n_documents = sum(record.train + record.held_out for record in records)
        if n_documents == 1:
            return n_documents
        notes = Notes(self.source.left_out.plain())
        for path, record in zip(paths, records, strict=True):
            notes.include(record.notes)
            _verify(path, record)
            if record.tokenizer != tokenizer.fingerprint:
                raise CorruptError(f"{path}: encoded with another tokenizer than the other units; delete {path.parent}")
        with ExitStack() as stack:
            for name in ("train", "held_out"):
                writer = SplitWriter(folder, name, tokenizer.vocab_size, stack)
                for path in paths:
                    writer.extend(path)
            text = stack.enter_context((folder / HELD_OUT_TEXT).open("wb"))
            for path in paths:
                text.write((path / HELD_OUT_TEXT).read_bytes())
        tokenizer.save(folder / TOKENIZER)
        encoded = Encoded(
            train=sum(record.train for record in records),
            held_out=sum(record.held_out for record in records),
            train_tokens=sum(record.train_tokens for record in records),
            tokens=sum(record.tokens for record in records),
            bytes=sum(record.bytes for record in records),
            lossless=all(record.lossless for record in records),
        )
        rule = rule_for_many(config.held_out_fraction)
        write_meta(folder, config, self.source.origin, tokenizer, rule, encoded, notes)
        return n_documents

    def _record(self, number: int) -> Path:
        return self.folder / f"unit-{number:06d}.json"


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """An exclusive lock. Without effect on file systems without locks, where a unit may be encoded twice."""
    with path.open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _verify(path: Path, record: UnitRecord) -> None:
    """Raise CorruptError, naming the file, if a file of a unit is missing or differs from the record."""
    for name, entry in record.files.items():
        file = path / name
        if not file.is_file() or os.path.getsize(file) != entry["size"] or sha256_of(file) != entry["sha256"]:
            raise CorruptError(f"{file}: damaged or missing; delete {path} to encode it again")


def available_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """`count` worker processes for a job, as a context manager; a thread per worker exchanges pickles with it by pipes.

    Workers are spawned, not forked, because the parent may have threads of tokenizers or torch. A worker ends when its
    parent does, even if that is killed.
    """

    # Not a ProcessPoolExecutor, for four reasons. Its spawned processes run the user's script again, so that a script
    # without a `__main__` guard breaks the pool. A killed worker fails every unit, and the error names neither the
    # worker nor the signal. Workers outlive a killed parent. A program that ends waits for all submitted units.

    def __init__(self, job: Job, count: int) -> None:
        cls = type(job.source)
        if cls.__module__ == "__main__":
            raise DataError(
                f"{cls.__qualname__}: workers cannot import it from a script: move the source to a file of its own"
            )
        self._job, packed = job, pickle.dumps(plugin_file(cls)) + pickle.dumps(job)
        self._tasks: queue.SimpleQueue[tuple[int, Future[UnitRecord]] | None] = queue.SimpleQueue()
        self._processes = [_start(packed) for _ in range(count)]
        self._threads = [Thread(target=self._work, args=(process,), daemon=True) for process in self._processes]
        for thread in self._threads:
            thread.start()
        self._kill = weakref.finalize(self, _kill, self._processes)  # at exit, too

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the processes; finished units are kept."""
        with suppress(queue.Empty):
            while task := self._tasks.get_nowait():
                task[1].cancel()
        for _ in self._threads:
            self._tasks.put(None)
        self._kill()
        for thread in self._threads:
            thread.join()

    def submit(self, number: int) -> "Future[UnitRecord]":
        """Encode a unit in a worker. The future raises as `Job.make` does, and DataError if the worker dies."""
        future: Future[UnitRecord] = Future()
        self._tasks.put((number, future))
        return future

    def make(self, numbers: list[int]) -> Iterator[UnitRecord]:
        """Encode units; yields their records as they are finished."""
        for done in as_completed([self.submit(number) for number in numbers]):
            yield done.result()

    def _work(self, process: "subprocess.Popen[bytes]") -> None:
        while task := self._tasks.get():
            number, future = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._ask(process, number))
                except Exception as error:  # raised by `result`
                    future.set_exception(error)

    def _ask(self, process: "subprocess.Popen[bytes]", number: int) -> UnitRecord:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump(number, process.stdin)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError):
            unit, status = self._job.source.describe_unit(self._job.units[number]), process.wait()
            ended = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise DataError(
                f"{unit}: the process that encoded it died ({ended}); run the same command again to continue, "
                f"with fewer `workers` if memory was short"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _start(packed_job: bytes) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, **_ONE_CORE, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-c", "from swamla.data.units import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # Ctrl-C goes to the parent, which ends its workers
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # a worker that died at once is reported by `_ask`
        process.stdin.write(packed_job)
        process.stdin.flush()
    return process


def _kill(processes: "list[subprocess.Popen[bytes]]") -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


def serve() -> None:
    """The main loop of a worker: reads a job, then numbers of units from stdin, and answers with records or errors."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keeps libraries' output out of the answers
    with suppress(KeyboardInterrupt, BrokenPipeError, EOFError):
        if (plugin := pickle.load(requests)) is not None:  # from the parent's own pipe
            load_plugin(plugin)
        job: Job = pickle.load(requests)
        tokenizer = load_tokenizer(job.folder / TOKENIZER)
        while True:
            pickle.dump(_answer(job, tokenizer, pickle.load(requests)), answers)
            answers.flush()


def _answer(job: Job, tokenizer: Tokenizer, number: int) -> UnitRecord | Exception:
    """The record of a unit, or an error that can be pickled."""
    try:
        return job.make(tokenizer, number)
    except SwamlaError as error:
        kind = next((kind for kind in (CorruptError, MissingBackendError) if isinstance(error, kind)), DataError)
        return kind(str(error))
    except OSError as error:
        return OSError(error.errno, error.strerror, error.filename)
    except Exception as error:
        traceback.print_exc()
        return RuntimeError(f"in a worker: {type(error).__name__}: {error}")
