"""Where runs are disturbed: processes that are forked from one which has imported everything, and their folders.

A trial thus costs a second instead of the five that importing torch would take on a busy core.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from swamla.checkpoint import latest_checkpoint, list_checkpoints, load_checkpoint
from swamla.train.tracking.metrics import read_metrics
from tests.faults import acts
from tests.waiting import PATIENCE

ROOT = Path(__file__).parents[2]

# Of the process that is forked, which imports acts by its name.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "src")])
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.faults.acts"])


class NotHere(Exception):
    """This machine does not allow the fault to be made; says why."""


class Process:
    """A process of a trial, from its start to its exit status."""

    def __init__(self, act: Callable[..., None], *args: Any, log: Path, env: dict[str, str] | None = None) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._process: ForkServerProcess = _context.Process(
            target=acts.play, args=(act, args, dict(env or {}), str(log)), daemon=True
        )
        self._process.start()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal, if it is still there."""
        if self._process.is_alive():
            assert self._process.pid is not None
            os.kill(self._process.pid, number)

    def alive(self) -> bool:
        """True until it has ended."""
        return self._process.is_alive()

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit status, minus the signal that ended it."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self.kill()
            raise AssertionError(f"still running after {seconds:.0f} s:\n{self.said()}")
        return self._process.exitcode

    def said(self) -> str:
        """Everything it wrote to its two streams so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def expect(self, status: int) -> str:
        """Wait for it to end with this status; returns what it said."""
        found = self.wait()
        assert found == status, f"ended with {found}, not {status}:\n{self.said()}"
        return self.said()


class Stage:
    """The folder of one row's trials, and the tiny data that all of them train on."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        self._count = 0
        self.undisturbed = cache(self._undisturbed)

    def fresh(self, name: str = "run") -> Path:
        """A folder that does not exist yet."""
        self._count += 1
        return self.folder / f"{name}-{self._count}"

    def start(self, run_dir: Path, *, env: dict[str, str] | None = None, **options: Any) -> Process:
        """Train in `run_dir` in a process of its own; options as of `acts.train_run`."""
        self._count += 1
        log = self.folder / f"{run_dir.name}-{self._count}.log"
        return Process(acts.train_run, str(run_dir), str(self.data), options, log=log, env=env)

    def ranks(self, run_dir: Path, count: int, *, env: dict[str, str] | None = None, **options: Any) -> list[Process]:
        """The same on several ranks, as torchrun would start them, without its restarts."""
        port = str(acts.free_port())
        places = [
            {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
            for rank in range(count)
        ]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **(env or {})}
        return [self.start(run_dir, env=common | place, **options) for place in places]

    def _undisturbed(self, **settings: Any) -> Path:
        """The folder of a finished run that nothing happened to, made once for its settings; all checkpoints kept."""
        run_dir = self.fresh("undisturbed")
        self.start(run_dir, settings=settings | {"keep_last": 10_000}).expect(0)
        return run_dir


@contextmanager
def ending(processes: list[Process]) -> Iterator[list[Process]]:
    """Whatever happens, no process of a trial is left behind."""
    try:
        yield processes
    finally:
        for process in processes:
            process.kill(signal.SIGCONT)
            process.kill()


def digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of weights, optimizer state and random generators."""
    import json

    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: file["sha256"] for name, file in files.items() if name.endswith(".safetensors")}


def newest(run_dir: Path) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are passed over, as a resumed run does."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = latest_checkpoint(run_dir / "checkpoints")
    return None if found is None else found.path


def step_of(checkpoint: Path | None) -> int:
    """Its step; 0 where there is none."""
    return 0 if checkpoint is None else load_checkpoint(checkpoint).step


def curve(run_dir: Path) -> list[tuple[int, float, float | None]]:
    """(step, training loss, held-out loss) of every record with either, without the clock."""
    return [
        (r["step"], r.get("loss", -1.0), r.get("held_out_loss"))
        for r in read_metrics(run_dir / "metrics.jsonl")
        if "loss" in r or "held_out_loss" in r
    ]


def assert_same_end(run_dir: Path, undisturbed: Path) -> None:
    """The curve, the weights, the optimizer's state and the random generators are equal, to the bit."""
    assert curve(run_dir) == curve(undisturbed)
    last, expected = list_checkpoints(run_dir / "checkpoints")[-1], list_checkpoints(undisturbed / "checkpoints")[-1]
    assert last.name == expected.name
    assert digests(last) == digests(expected)
