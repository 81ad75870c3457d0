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
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
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
    """`count` processes for a job; a context that ends them."""

    def __init__(self, job: Job, count: int) -> None:
        self._job, self._packed = job, pickle.dumps(job)
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._all = [self._start() for _ in range(count)]
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="swamla-units")

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; what they were at is lost, what they finished is not."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._all:
            worker.kill()
        self._threads.shutdown(wait=True)
        for worker in self._all:
            worker.communicate()

    def submit(self, number: int) -> "Future[UnitRecord]":
        """Have a unit made. The future raises as `make_unit` does, and DataError if the worker dies."""
        return self._threads.submit(self._make, number)

    def make(self, numbers: list[int]) -> Iterator[UnitRecord]:
        """Make units; their records come as they are finished."""
        for done in as_completed([self.submit(number) for number in numbers]):
            yield done.result()

    def _start(self) -> "subprocess.Popen[bytes]":
        environment = {**os.environ, **_ONE_CORE, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        worker = subprocess.Popen(
            [sys.executable, "-c", "from swamla.data.workers import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent, who ends its workers
        )
        assert worker.stdin is not None
        with suppress(BrokenPipeError):  # a worker that died at once is noticed when it does not answer
            worker.stdin.write(self._packed)
            worker.stdin.flush()
        self._idle.put(worker)
        return worker

    def _make(self, number: int) -> UnitRecord:
        worker = self._idle.get()
        assert worker.stdin is not None
        assert worker.stdout is not None
        with suppress(BrokenPipeError):
            worker.stdin.write(b"%d\n" % number)
            worker.stdin.flush()
        answer = worker.stdout.readline()
        self._idle.put(worker)  # a dead one, too: whoever takes it next is told the same and does not wait for ever
        if not answer:
            unit = describe_unit(self._job.source, self._job.units[number])
            raise DataError(
                f"{unit}: the process that encoded it died ({_how_it_ended(worker.wait())}); run the same command "
                f"again to go on, with fewer --workers if memory was short"
            )
        return _read(json.loads(answer))


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
