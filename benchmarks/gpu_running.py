"""Rows of a benchmark, each in a process of its own: what breaks one, or hangs it, leaves the others whole.

A CUDA error stays with its process for good, and kernels can hang. Processes are forked off a server that has loaded
torch and never touched the device, so that a row waits for its CUDA context alone, not for imports.
"""

import contextlib
import math
import multiprocessing as mp
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from swamla.errors import MissingBackendError

Figures = dict[str, Any]
Message = tuple[str, Any]  # ("figures", Figures), or ("skipped" or "failed", why)
START_UP = 120.0  # seconds that a process may take before its row begins
AFTER_KILL = 10.0  # that a killed one may take to be gone; a driver may hold it longer
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how rows run.

    device: "cuda", or "cpu" for a dry run.
    quick: every row at tiny sizes, whose figures mean nothing.
    """

    device: str = "cuda"
    quick: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing to measure, which may take several figures.

    name: says what, and stands in the results.
    table: of the results that it belongs to.
    run: yields figures as soon as it has them; raises where there are none.
    needs: seconds below which it is not worth a beginning.
    limit: seconds after which it is killed.
    vouches: for a gate, the "op/backend" pairs that cannot be trusted where it fails.
    """

    name: str
    table: str
    run: Callable[[Place], Iterator[Figures]]
    needs: float = 10.0
    limit: float = 60.0
    vouches: tuple[str, ...] = ()


def here(row: Row, place: Place, left: float = math.inf) -> Iterator[Message]:
    """Run a row in this process, however long it takes: its figures, then why there are no more, if it failed."""
    try:
        for figures in row.run(place):
            yield "figures", {key: plain(value) for key, value in figures.items()}
    except (MissingBackendError, ModuleNotFoundError) as missing:
        yield "skipped", last_line(missing)
    except Exception as error:
        traceback.print_exc()
        yield "failed", f"{type(error).__name__}: {last_line(error)}"


def plain(value: Any) -> Any:
    """What JSON can hold: a figure that is no number becomes text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def last_line(error: BaseException | str) -> str:
    """Of a message that may be long, the end, which says most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else ""


class Processes:
    """Runs rows in processes of their own. What they print, and their tracebacks, go to `log`, anew."""

    def __init__(self, log: Path, preload: tuple[str, ...] = ()) -> None:
        self._log = log
        log.write_bytes(b"")
        known = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, known))
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # imports may ask for devices: without a context
        self._context: Any = mp.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))

    def __call__(self, row: Row, place: Place, left: float = math.inf) -> Iterator[Message]:
        """As `here`, but for the row's limit at most, and `left` seconds with its start."""
        end = time.monotonic() + left
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_serve, args=(row, place, self._log, sender))
        process.start()
        sender.close()
        try:
            for kind, content in _messages(process, receiver, row.limit, end, self._log):
                if kind == "unusable":
                    self._context = mp.get_context("spawn")
                    yield from self(row, place, end - time.monotonic())
                    return
                yield kind, content
        finally:
            _end(process)
            receiver.close()


def _messages(process: Any, receiver: Connection, limit: float, end: float, log: Path) -> Iterator[Message]:
    """What a row sends until it has ended, died or run out of time."""
    allowed, since, doing = START_UP, time.monotonic(), "did not start"
    while True:
        left = min(since + allowed, end) - time.monotonic()
        if not wait([receiver, process.sentinel], timeout=max(0.0, left)):
            yield "failed", f"{doing} within {min(allowed, end - since):.3g} s: killed"
            return
        try:
            kind, content = receiver.recv() if receiver.poll() else ("died", None)
        except EOFError:
            kind, content = "died", None
        if kind == "begun":
            allowed, since, doing = limit, time.monotonic(), "did not end"
        elif kind == "died":
            process.join(AFTER_KILL)
            yield "failed", f"died ({_cause(process.exitcode)}): {last_line(_tail(log))}"
            return
        elif kind == "ended":
            return
        else:
            yield kind, content


def _serve(row: Row, place: Place, log: Path, sender: Connection) -> None:
    """A row's process."""
    os.setsid()  # so that helpers it starts, such as compilers, can be killed with it
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    print(f"--- {row.table}: {row.name}", file=sys.stderr, flush=True)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda._is_in_bad_fork():  # an import has touched the device before the fork
        sender.send(("unusable", None))
        return
    sender.send(("begun", None))
    for message in here(row, place):
        sender.send(message)
    sender.send(("ended", None))


def _end(process: Any) -> None:
    """Kill a row's process, if it still is there, and all that it started."""
    process.join(0.5)  # one that has ended leaves by itself
    with contextlib.suppress(ProcessLookupError, PermissionError):  # gone, or not yet a group of its own
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join(AFTER_KILL)


def _cause(exit_code: int | None) -> str:
    if exit_code is None:
        return "its process does not end"
    return signal.Signals(-exit_code).name if exit_code < 0 else f"exit status {exit_code}"


def _tail(log: Path) -> str:
    return log.read_bytes()[-4000:].decode(errors="replace")
