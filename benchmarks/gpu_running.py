"""Runs each row of a benchmark in its own process, so that an error or a hang does not affect other rows.

A CUDA error makes its process unusable, and kernels can hang. Processes are forked from a server that has imported
torch but never used the device, so that a row waits only for its CUDA context, not for imports.
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
AFTER_KILL = 10.0  # seconds that a killed process may take to end; a driver may delay it
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how rows run.

    device: "cuda", or "cpu" for a dry run.
    quick: every row at tiny sizes; the figures mean nothing.
    """

    device: str = "cuda"
    quick: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement, which may give several sets of figures.

    name: its name in the results.
    table: its table in the results.
    run: yields figures as soon as it has them; raises if there are none.
    needs: seconds that must be left to start it.
    limit: seconds after which it is killed.
    vouches: for a gate, the "op/backend" pairs that it checks.
    """

    name: str
    table: str
    run: Callable[[Place], Iterator[Figures]]
    needs: float = 10.0
    limit: float = 60.0
    vouches: tuple[str, ...] = ()


def here(row: Row, place: Place, left: float = math.inf) -> Iterator[Message]:
    """Run a row in this process, without a time limit; yields its figures, and the error if it failed."""
    try:
        for figures in row.run(place):
            yield "figures", {key: plain(value) for key, value in figures.items()}
    except (MissingBackendError, ModuleNotFoundError) as missing:
        yield "skipped", last_line(missing)
    except Exception as error:
        traceback.print_exc()
        yield "failed", f"{type(error).__name__}: {last_line(error)}"


def plain(value: Any) -> Any:
    """A JSON value: infinities and NaN become text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def last_line(error: BaseException | str) -> str:
    """The last line of a message, which usually says most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else ""


class Processes:
    """Runs every row in its own process. Output and tracebacks go to `log`, which is overwritten."""

    def __init__(self, log: Path, preload: tuple[str, ...] = ()) -> None:
        self._log = log
        log.write_bytes(b"")
        known = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, known))
        os.environ.setdefault(
            "PYTORCH_NVML_BASED_CUDA_CHECK", "1"
        )  # so that imports that query devices create no CUDA context
        self._context: Any = mp.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))

    def __call__(self, row: Row, place: Place, left: float = math.inf) -> Iterator[Message]:
        """As `here`, within the row's limit, and within `left` seconds including the start of its process."""
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
    """The messages of a row until it ends, dies or runs out of time."""
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
    """The main function of a row's process."""
    os.setsid()  # so that helpers it starts, such as compilers, can be killed with it
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    print(f"--- {row.table}: {row.name}", file=sys.stderr, flush=True)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda._is_in_bad_fork():  # an import used the device before the fork
        sender.send(("unusable", None))
        return
    sender.send(("begun", None))
    for message in here(row, place):
        sender.send(message)
    sender.send(("ended", None))


def _end(process: Any) -> None:
    """Kill a row's process if it still runs, and all processes that it started."""
    process.join(0.5)  # if the row has ended, so does its process
    with contextlib.suppress(ProcessLookupError, PermissionError):  # ended, or not yet a process group
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join(AFTER_KILL)


def _cause(exit_code: int | None) -> str:
    if exit_code is None:
        return "its process does not end"
    return signal.Signals(-exit_code).name if exit_code < 0 else f"exit status {exit_code}"


def _tail(log: Path) -> str:
    return log.read_bytes()[-4000:].decode(errors="replace")
