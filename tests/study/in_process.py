"""`swamla reproduce` whose runs are trained in its own process, which spares their start; killed on demand.

python in_process.py RUN ARGUMENTS …     the RUN-th run that is started kills the process, behind its first checkpoint
"""

import os
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from swamla.cli import reproduce
from swamla.cli.train import main as train
from swamla.study.nanogpt_mla import measured
from swamla.study.nanogpt_mla.figures import write_figures
from swamla.study.running import run_study
from swamla.train import loop


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


def reproduced(arguments: list[str], kill_at: int = 0, *, pictures: bool = True) -> list[list[str]]:
    """Run the command; the words of the runs that it started. pictures: those of the first experiment, or none.

    Measures are of few rows, and runs have no picture of their loss: pictures and rows would take most of the time.
    """
    started: list[list[str]] = []
    with ExitStack() as stack:

        def instead(where: Any, **values: Any) -> None:
            stack.enter_context(patch.multiple(where, **values))

        launch = partial(InProcess, started=started, kill_at=kill_at)
        instead(reproduce, run_study=partial(run_study, launch=launch))
        instead(measured, SCORED_ROWS=8, REPEAT_ROWS=4, SAMPLE=8)
        instead(loop, plot_losses=lambda *_, **__: None)

        def drawn(data: dict[str, Any], folder: Path) -> list[str]:
            return write_figures(data | {"experiments": data["experiments"][:1]}, folder) if pictures else []

        instead(reproduce, write_figures=drawn)
        assert reproduce.main(arguments) == 0
    return started


if __name__ == "__main__":
    reproduced(sys.argv[2:], int(sys.argv[1]))
