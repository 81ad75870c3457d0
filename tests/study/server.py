"""Works on studies whose runs are real, each a fork: `swamla train` without another start of torch.

Reads lines "STUDY score" or "STUDY ARM"; for each it forks a process that works on the study, and prints its number
and, when it has ended, its exit status. Runs of the ARM stand still at their tenth step until the study's folder has a
file "go": however slow the machine is, none has ended before it is to.
"""

import os
import sys
import time
from functools import partial
from pathlib import Path

import matplotlib.pyplot as _pyplot  # noqa: F401  # what every run imports
import torch._dynamo as _dynamo  # noqa: F401

import swamla.cli.train  # noqa: F401
from swamla.cli import main
from swamla.data.preparing import prepare
from swamla.study.folder import opened
from swamla.study.running import run_study
from swamla.study.scoring import score_tests
from swamla.train import loop


class Forked:
    """A process that does a command of this program; nothing was computed before it was forked."""

    def __init__(self, words: list[str], log: Path, *, still: str, folder: Path) -> None:
        self.status: int | None = None
        self.child = os.fork()
        if self.child:
            return
        try:
            if Path(words[-1]).name.startswith(still):
                loop.fault = partial(stand_still, folder / "go")
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os._exit(main(words))
        finally:
            os._exit(70)

    def poll(self) -> int | None:
        if self.status is None:
            found, status = os.waitpid(self.child, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if found else None
        return self.status

    def terminate(self) -> None:
        os.kill(self.child, 15)

    def wait(self) -> int:
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        return self.status


def stand_still(go: Path, point: str, step: int) -> None:
    """What is called where a run can be killed: here it waits for a file."""
    while (point, step) == ("begin", 10) and not go.exists():
        time.sleep(0.01)


def work(folder: Path, what: str) -> None:
    """What `swamla compare` does of a planned study."""
    run_study(folder, launch=partial(Forked, still=f"{what}-", folder=folder))
    if what == "score":
        study = opened(folder)
        assert study is not None
        score_tests(folder, prepare(study.arms[0].config.data))


if __name__ == "__main__":
    for line in sys.stdin:
        folder, what = line.split()
        child = os.fork()
        if not child:
            try:
                os.setsid()  # a group of its own, which can be killed as a whole
                work(Path(folder), what)
                os._exit(0)
            finally:
                os._exit(1)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
