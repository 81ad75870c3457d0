"""What a signal does is said at once, and a second one leaves: in preparing, training and evaluating."""

import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.waiting import PATIENCE, running

SWAMLA = [sys.executable, "-m", "swamla"]
TRAIN = shlex.split(
    "train --data text.txt --tokenizer byte --held_out_fraction 0.1 --pattern swa --width 16 --n_heads 2 "
    "--steps 100000 --max_minutes none --eval_seconds none --batch_size 2 --block_size 16 --log_interval 1 --threads 1"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "text.txt").write_text("".join(f"line {i}, which is {i * i}\n\n" for i in range(300)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def process(command: list[str], until: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that has printed `until`, within `PATIENCE`."""
    with running(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as found:
        assert found.stdout is not None
        too_late = threading.Timer(PATIENCE, found.kill)
        too_late.start()
        assert any(until in line for line in found.stdout)
        too_late.cancel()
        yield found


def next_line(found: "subprocess.Popen[str]") -> str:
    """The next line on stderr that is not about the start."""
    assert found.stderr is not None
    return next(line for line in found.stderr if "starting" not in line and line.strip())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_training_says_what_it_does_and_then_saves(number: signal.Signals, status: int, folder: Path) -> None:
    with process([*SWAMLA, *TRAIN], "Step 2 ") as found:
        found.send_signal(number)
        line = f"stop requested ({number.name}): finishing this step, then saving; again to leave now"
        assert next_line(found) == f"swamla: {line}\n"
        assert f"stopped by {number.name} after step" in next_line(found)
        assert found.wait(PATIENCE) == status


@pytest.mark.parametrize(
    ("patch", "doing"),
    [
        ("real, loop.training_step = loop.training_step, blocked", "finishing this step"),
        ("held_out.evaluate_split = blocked; real = lambda *_, **__: {}['ended']", "ending the evaluation"),
    ],
    ids=["step", "evaluation"],
)
def test_it_is_said_while_the_main_thread_runs_no_python(patch: str, doing: str, folder: Path) -> None:
    code = f"""
import sys, ctypes
from swamla.evaluate import held_out
from swamla.train import loop
from swamla.cli import main
def blocked(*arguments, **settings):
    print("at work", flush=True)
    everything = (ctypes.c_ulong * 16)(*[2**64 - 1] * 16)  # no signal ends the call, as none ends a product
    ctypes.CDLL(None).pselect(0, None, None, None, (ctypes.c_long * 2)(8, 0), everything)
    return real(*arguments, **settings)
{patch}
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", code, *TRAIN, "--eval_interval", "1"]
    with process(command, "at work") as found:
        time.sleep(1)  # until it is in the call
        begin = time.monotonic()
        found.send_signal(signal.SIGTERM)
        assert doing in next_line(found)
        assert time.monotonic() - begin < 6  # the call goes on for 8 s
        found.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_leaves_training_without_another_save(number: signal.Signals, folder: Path) -> None:
    code = """
import sys, time
from swamla.train import loop
from swamla.cli import main
def slow(*_, **__):
    print("saving", flush=True)
    time.sleep(600)
loop._save_last = slow
sys.exit(main(sys.argv[1:]))
"""
    with process([sys.executable, "-c", code, *TRAIN], "Step 2 ") as found:
        found.send_signal(number)
        assert "again to leave now" in next_line(found)
        time.sleep(2.5)  # one that comes sooner may have been sent with the first
        found.send_signal(number)
        assert next_line(found) == "swamla: leaving at once\n"
        assert re.search(r"interrupted|left at once, nothing more was saved", next_line(found))
        assert found.wait(PATIENCE) == 128 + number


def test_slurms_sigterm_after_its_warning_waits_for_the_save(folder: Path) -> None:
    code = """
import sys, time
from swamla.train import loop
from swamla.cli import main
real = loop._save_last
def slow(*arguments):
    time.sleep(3)
    real(*arguments)
loop._save_last = slow
sys.exit(main(sys.argv[1:]))
"""
    with process([sys.executable, "-c", code, *TRAIN], "Step 2 ") as found:
        found.send_signal(signal.SIGUSR1)
        assert "stop requested (SIGUSR1): finishing this step, then saving\n" in next_line(found)
        time.sleep(2.5)
        found.send_signal(signal.SIGTERM)
        assert found.wait(PATIENCE) == 75


@pytest.mark.parametrize(("number", "said"), [(signal.SIGTERM, "stopped by SIGTERM"), (signal.SIGINT, "interrupted")])
@pytest.mark.parametrize("command", ["prepare text.txt", "evaluate a-run", "train --data text.txt"])
def test_elsewhere_one_signal_ends_it_at_once(command: str, number: signal.Signals, said: str, folder: Path) -> None:
    code = """
import sys, time
from swamla.cli import main, running, scoring
def slow(*_, **__):
    print("at work", flush=True)
    time.sleep(600)
running.prepare = scoring.read_run_config = slow
sys.exit(main(sys.argv[1:]))
"""
    with process([sys.executable, "-c", code, *command.split()], "at work") as found:
        found.send_signal(number)
        assert said in next_line(found)
        assert found.wait(PATIENCE) == 128 + number


def test_in_a_librarys_long_call_it_is_said_that_it_stops_and_a_second_signal_leaves(folder: Path) -> None:
    code = """
import sys, ctypes
from swamla.cli import main, running
def slow(*_, **__):
    print("at work", flush=True)
    blocked = (ctypes.c_ulong * 16)(*[2**64 - 1] * 16)  # no signal ends the call, as none ends a library's loop
    ctypes.CDLL(None).pselect(0, None, None, None, (ctypes.c_long * 2)(600, 0), blocked)
running.prepare = slow
sys.exit(main(sys.argv[1:]))
"""
    with process([sys.executable, "-c", code, "prepare", "text.txt"], "at work") as found:
        time.sleep(1)  # until it is in the call
        found.send_signal(signal.SIGTERM)
        assert "stopping (SIGTERM), when the library's call that runs now returns" in next_line(found)
        time.sleep(2.5)
        found.send_signal(signal.SIGTERM)
        assert next_line(found) == "swamla: left at once\n"
        assert found.wait(PATIENCE) == 128 + signal.SIGTERM


@pytest.mark.parametrize(("number", "said"), [(signal.SIGTERM, "stopped by SIGTERM; "), (signal.SIGINT, "")])
def test_after_training_a_signal_says_that_the_run_is_saved(number: signal.Signals, said: str, folder: Path) -> None:
    code = """
import sys, time
from swamla.cli import main, train
def slow(*_, **__):
    print("at work", flush=True)
    time.sleep(600)
train.say_results = slow
sys.exit(main(sys.argv[1:]))
"""
    command = [word if word != "100000" else "2" for word in TRAIN]
    with process([sys.executable, "-c", code, *command], "at work") as found:
        found.send_signal(number)
        first = next_line(found)
        last = first if said else next_line(found)
        assert last == f"swamla: {said}the run is finished, all is saved in runs/quickstart\n"
        assert found.wait(PATIENCE) == 128 + number


def test_once_all_is_saved_a_signal_says_so(folder: Path) -> None:
    code = """
import sys, time
from swamla.train import loop
from swamla.cli import main
def slow(*_, **__):
    print("drawing", flush=True)
    time.sleep(1)
loop._plot = slow
sys.exit(main(sys.argv[1:]))
"""
    command = [word if word != "100000" else "2" for word in TRAIN]
    with process([sys.executable, "-c", code, *command], "drawing") as found:
        found.send_signal(signal.SIGTERM)
        assert next_line(found) == "swamla: stop requested (SIGTERM): all is saved, ending; again to leave now\n"
