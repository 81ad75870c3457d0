"""Two machines, as far as the network is concerned: two namespaces joined by a cable, a rank in each."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.ranks import EIGHT, _undisturbed
from tests.faults.rows import Row
from tests.faults.stage import ROOT, NotHere, Stage, assert_same_end
from tests.waiting import until

LIMIT = 8.0  # seconds without a sign of life


def _ip(command: str) -> None:
    try:
        done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
    except FileNotFoundError:
        raise NotHere("network namespaces take the program ip") from None
    if done.returncode != 0:
        raise NotHere(f"network namespaces are not allowed here: {done.stderr.strip()}")


@contextmanager
def machines() -> Iterator[list[str]]:
    """The names of two namespaces, each with an interface cable0 or cable1, 10.79.0.1 and 10.79.0.2."""
    names = [f"swamla-fault-{os.getpid()}-{i}" for i in range(2)]
    try:
        for name in names:
            _ip(f"netns add {name}")
        _ip(f"link add cable0 netns {names[0]} type veth peer name cable1 netns {names[1]}")
        for i, name in enumerate(names):
            for command in (f"addr add 10.79.0.{i + 1}/24 dev cable{i}", f"link set cable{i} up", "link set lo up"):
                _ip(f"-n {name} {command}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _pair(names: list[str], stage: Stage, run_dir: Path, port: int) -> "list[subprocess.Popen[str]]":
    started = []
    for rank, name in enumerate(names):
        env = {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "10.79.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": f"cable{rank}",
            "OMP_NUM_THREADS": "1",
            "SWAMLA_SLOWLY": "0.7",
            "SWAMLA_LIMIT": str(LIMIT),
        }
        program = [sys.executable, str(ROOT / "tests" / "faults" / "program.py"), str(run_dir), str(stage.data), "8"]
        command = ["ip", "netns", "exec", name, *program]
        log = run_dir.with_name(f"{run_dir.name}-{port}-{rank}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as stream:
            started.append(
                subprocess.Popen(command, env=os.environ | env, stdout=stream, stderr=subprocess.STDOUT, text=True)
            )
    return started


def _said(run_dir: Path, port: int) -> list[str]:
    return [run_dir.with_name(f"{run_dir.name}-{port}-{rank}.log").read_text() for rank in range(2)]


@contextmanager
def _cut(name: str) -> Iterator[None]:
    """The cable pulled out at the second machine, and put back."""
    _ip(f"-n {name} link set cable1 down")
    try:
        yield
    finally:
        _ip(f"-n {name} link set cable1 up")


def _in_the_middle(run_dir: Path, processes: "list[subprocess.Popen[str]]") -> None:
    file = run_dir / "metrics.jsonl"
    until(lambda: (file.exists() and '"step": 3' in file.read_text()) or processes[0].poll() is not None)


def blip(stage: Stage, times: int) -> Iterator[None]:
    """No packet gets through for three seconds."""
    expected = _undisturbed(stage, 2, **EIGHT)
    for trial in range(times):
        with machines() as names:
            run_dir, port = stage.fresh(), 29510 + trial
            processes = _pair(names, stage, run_dir, port)
            try:
                _in_the_middle(run_dir, processes)
                with _cut(names[1]):
                    time.sleep(3)
                statuses = [process.wait(timeout=120) for process in processes]
            finally:
                for process in processes:
                    process.kill()
            assert statuses == [0, 0], _said(run_dir, port)
            assert_same_end(run_dir, expected)
        yield


def lost(stage: Stage, times: int) -> Iterator[None]:
    """The cable stays out until both have given up; then both are started again."""
    expected = _undisturbed(stage, 2, **EIGHT)
    for trial in range(times):
        with machines() as names:
            run_dir, port = stage.fresh(), 29530 + trial
            processes = _pair(names, stage, run_dir, port)
            try:
                _in_the_middle(run_dir, processes)
                with _cut(names[1]):
                    began = time.monotonic()
                    statuses = [process.wait(timeout=5 * LIMIT) for process in processes]
                    seconds = time.monotonic() - began
            finally:
                for process in processes:
                    process.kill()
            said = _said(run_dir, port)
            assert statuses == [1, 1], said
            assert seconds < 3 * LIMIT, seconds
            assert "rank 1 hangs or is cut off" in said[0], said
            assert "cut off from rank 1, which is in step" in said[1], said
            again = _pair(names, stage, run_dir, port + 10)
            assert [process.wait(timeout=120) for process in again] == [0, 0], _said(run_dir, port + 10)
            assert_same_end(run_dir, expected)
        yield


ROWS = [
    Row(
        fault="a network blip of 3 s between two machines",
        expected="the run rides through, to the same end to the bit",
        how="two network namespaces joined by a veth pair, a rank in each; the link goes down and up",
        trials=blip,
        short=0,
        long=2,
    ),
    Row(
        fault="a machine lost",
        expected=f"both sides end within the time-out ({LIMIT:.0f} s here) and say what is cut off; started again they "
        "go on to the same end",
        how="the same; the link stays down",
        trials=lost,
        short=0,
        long=1,
        tests=("tests/distributed/test_torchrun.py::test_two_machines_train_as_one_process_does",),
    ),
]
