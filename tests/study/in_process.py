"""`swamla reproduce` whose runs are trained in its own process, which spares their start; killed on demand.

python in_process.py RUN ARGUMENTS …     the RUN-th run that is started kills the process, behind its first checkpoint
"""

import os
import sys
from functools import partial
from pathlib import Path

from swamla.cli import reproduce
from swamla.cli.train import main as train
from swamla.study.nanogpt_mla import measured
from swamla.study.running import run_study


class InProcess:
    """What `subprocess.Popen` has, of a command that has run already. started: words of all commands."""

    def __init__(self, words: list[str], log: Path, *, started: list[list[str]], kill_at: int = 0) -> None:
        started.append(words)
        if len(started) == kill_at:
            os.environ["SWAMLA_FAULT"] = "save-rename:1"
        self.status = train(words[1:])

    def poll(self) -> int | None:
        return self.status

    def terminate(self) -> None:
        pass

    def wait(self) -> int:
        return self.status


# Measures of few rows: what they are worth is another matter, and most of the time would go into drawing rows.
measured.SCORED_ROWS, measured.REPEAT_ROWS = 8, 4
measured.SAMPLE = 8


def reproduced(arguments: list[str], kill_at: int = 0) -> list[list[str]]:
    """Run the command; the words of the runs that it started."""
    started: list[list[str]] = []
    reproduce.run_study = partial(run_study, launch=partial(InProcess, started=started, kill_at=kill_at))
    try:
        assert reproduce.main(arguments) == 0
    finally:
        reproduce.run_study = run_study
    return started


if __name__ == "__main__":
    reproduced(sys.argv[2:], int(sys.argv[1]))
