"""Being asked to stop."""

import errno
import io
import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import swamla
from swamla.checkpoint import latest_checkpoint
from swamla.cli.console import Console
from swamla.errors import Interrupted
from swamla.train import train
from swamla.train.signals import SAVED, SAVING, STEP, StopRequest
from tests.waiting import PATIENCE, running

from .helpers import run, tiny_config

PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.train.helpers import tiny_config, tiny_dataset
from swamla.errors import SwamlaError
from swamla.train import train
try:
    train(tiny_config(steps=10**6), Path({run!r}), dataset=tiny_dataset(Path({data!r})))
except SwamlaError as error:
    print(error)
    sys.exit(error.exit_status)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)])
def test_a_running_program_finishes_its_step_saves_and_exits_with_the_right_status(tmp_path, number, status):
    paths = {"root": str(Path(__file__).parents[2]), "run": str(tmp_path / "run"), "data": str(tmp_path)}
    python_path = os.pathsep.join([str(Path(swamla.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-u", "-c", PROGRAM.format(**paths)]
    with running(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("Step 3 "):
                process.send_signal(number)
                break
        rest = process.stdout.read()
        assert process.wait(timeout=PATIENCE) == status, rest
    assert f"stopped by {number.name} after step" in rest
    found = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert f"after step {found.step}; all is saved in {tmp_path / 'run'}" in rest


def test_the_first_ctrl_c_is_noted_and_the_second_aborts_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.received, stop.exit_status) == (signal.SIGINT, 130)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_preemption_signals_are_noted_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert (stop.received, stop.exit_status) == (number, 75)
    assert signal.getsignal(number) is before


def test_outside_the_main_thread_the_process_keeps_its_handlers():
    before, found = signal.getsignal(signal.SIGTERM), []

    def work():
        with StopRequest() as stop:
            found.append((stop.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, before)]


def test_what_the_process_was_started_to_ignore_as_by_nohup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_whose_terminal_is_gone_saves_and_says_so_where_anybody_reads(tmp_path):
    paths = {"root": str(Path(__file__).parents[2]), "run": str(tmp_path / "run"), "data": str(tmp_path)}
    program = PROGRAM.replace("print(error)", "print(error, file=sys.stderr)").format(**paths)
    said = tmp_path / "said.txt"
    python_path = os.pathsep.join([str(Path(swamla.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    process, terminal = pty.fork()
    if process == 0:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        environment = os.environ | {"PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", "TERM": "xterm"}
        os.execve(sys.executable, [sys.executable, "-u", "-c", program], environment)
    seen = b""
    while b"bits/byte" not in seen:
        seen += os.read(terminal, 4096)
    os.close(terminal)
    _, ended = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(ended) == 75, said.read_text()
    found = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None
    told, ended = said.read_text().splitlines()
    before, _, doing = told.partition(": ")[2].partition(": ")
    assert before == "stop requested (SIGHUP)"
    assert doing in (STEP, SAVING, SAVED)  # a thread says it; the run may be further by then
    assert ended == f"stopped by SIGHUP after step {found.step}; all is saved in {tmp_path / 'run'}"


class Reader(io.StringIO):
    """Leaves after so many lines; what is written to it then fails with `error`."""

    def __init__(self, lines: int, error: int = errno.EPIPE) -> None:
        super().__init__()
        self.lines, self.error = lines, error

    def write(self, text: str) -> int:
        if self.lines == 0:
            raise OSError(self.error, os.strerror(self.error))
        self.lines -= text.count("\n")
        return len(text)


@pytest.mark.parametrize("lines", [0, 3, 6])
def test_a_run_that_nobody_reads_any_more_saves_and_ends(tmp_path, dataset, lines):
    with pytest.raises(Interrupted, match=r"stopped by SIGPIPE after step .*; all is saved") as caught:
        train(tiny_config(), tmp_path / "run", dataset=dataset, console=Console(file=Reader(lines)))
    assert caught.value.exit_status == 141
    found = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert f"after step {found.step};" in str(caught.value)


def test_a_terminal_that_is_gone_before_its_signal_arrives_stops_the_run_as_the_signal_does(tmp_path, dataset):
    with pytest.raises(Interrupted, match=r"stopped by SIGHUP after step .*; all is saved") as caught:
        train(tiny_config(), tmp_path / "run", dataset=dataset, console=Console(file=Reader(3, errno.EIO)))
    assert caught.value.exit_status == 75
    assert run(tiny_config(), tmp_path / "run", dataset, resume=True).step == 6
