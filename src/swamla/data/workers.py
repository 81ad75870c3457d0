"""Processes that encode units, one core each.

They are started anew and never forked (the parent has threads, of tokenizers, torch or the caller), and talk over
pipes: nothing asks of a user's script that it be importable. A worker ends when its parent does, however that ended.
"""

import json
import os
import pickle
import queue
import subprocess
import sys
import traceback
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, as_completed
from contextlib import suppress
from threading import Thread
from typing import Any, BinaryIO

from swamla import errors
from swamla.data.tokenizer import load_tokenizer
from swamla.data.unit_files import Job, UnitRecord, make_unit
from swamla.data.units import describe_unit
from swamla.errors import DataError, SwamlaError

TOKENIZER = "tokenizer.json"  # in the job's folder
_ONE_CORE = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """`count` processes for a job, each with a thread that talks to it; a context that ends them."""

    def __init__(self, job: Job, count: int) -> None:
        self._job, packed = job, pickle.dumps(job)
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
        """End the processes; what they were at is lost, what they finished is not."""
        with suppress(queue.Empty):
            while task := self._tasks.get_nowait():
                task[1].cancel()
        for _ in self._threads:
            self._tasks.put(None)
        self._kill()
        for thread in self._threads:
            thread.join()

    def submit(self, number: int) -> "Future[UnitRecord]":
        """Have a unit made. The future raises as `make_unit` does, and DataError if the worker dies."""
        future: Future[UnitRecord] = Future()
        self._tasks.put((number, future))
        return future

    def make(self, numbers: list[int]) -> Iterator[UnitRecord]:
        """Make units; their records come as they are finished."""
        for done in as_completed([self.submit(number) for number in numbers]):
            yield done.result()

    def _work(self, process: "subprocess.Popen[bytes]") -> None:
        while task := self._tasks.get():
            number, future = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._ask(process, number))
                except Exception as error:  # for whoever waits for it
                    future.set_exception(error)

    def _ask(self, process: "subprocess.Popen[bytes]", number: int) -> UnitRecord:
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write(b"%d\n" % number)
            process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            unit = describe_unit(self._job.source, self._job.units[number])
            raise DataError(
                f"{unit}: the process that encoded it died ({_how_it_ended(process.wait())}); run the same command "
                f"again to go on, with fewer --workers if memory was short"
            )
        return _read(json.loads(answer))


def _start(packed_job: bytes) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, **_ONE_CORE, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-c", "from swamla.data.workers import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # Ctrl-C is for the parent, who ends its workers
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # a worker that died at once is noticed when it does not answer
        process.stdin.write(packed_job)
        process.stdin.flush()
    return process


def _kill(processes: "list[subprocess.Popen[bytes]]") -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


def _how_it_ended(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"


def _read(answer: dict[str, Any]) -> UnitRecord:
    if "record" in answer:
        return UnitRecord(**answer["record"])
    if "os_error" in answer:
        raise OSError(*answer["os_error"])
    if "bug" in answer:
        raise RuntimeError(f"in a worker: {answer['bug']}")
    raise getattr(errors, answer["error"])(answer["message"])


def serve() -> None:
    """A worker: reads a job and then numbers of units from standard input, answers a line of JSON for each."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    with suppress(KeyboardInterrupt, BrokenPipeError, EOFError):
        _serve(sys.stdin.buffer, answers)


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    job: Job = pickle.load(requests)  # from the parent's own pipe
    tokenizer = load_tokenizer(job.folder / TOKENIZER)
    for number in requests:
        answers.write(json.dumps(_answer(job, tokenizer, int(number))).encode() + b"\n")
        answers.flush()


def _answer(job: Job, tokenizer: Any, number: int) -> dict[str, Any]:
    try:
        return {"record": make_unit(job, tokenizer, number).__dict__}
    except SwamlaError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except OSError as error:
        return {"os_error": [error.errno, error.strerror, error.filename]}
    except Exception as error:
        traceback.print_exc()
        return {"bug": f"{type(error).__name__}: {error}"}
