"""What `swamla recall` tells: recall.json, recall.csv, recall.png, and a table."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from swamla.cli.console import Console, say_wrapped
from swamla.cli.info_tables import short
from swamla.evaluate import Recall
from swamla.evaluate.recall_figure import draw_recall
from swamla.evaluate.recall_grid import KNOWN
from swamla.files import write_text_atomically
from swamla.model import LanguageModel
from swamla.model.accounting import count_parameters
from swamla.tasks import Task
from swamla.version import __version__


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run that is scored. task: what it was trained on.  step: of its checkpoint.

    steps: to an accuracy of `KNOWN` in its evaluations, None if none had it.  evaluated: whether these have accuracies.
    """

    name: str
    step: int
    precision: Literal["fp32", "bf16"]
    task: Task
    model: LanguageModel
    steps: int | None
    evaluated: bool


@dataclass(kw_only=True)
class Report:
    """What was found. swept: the sizes with several values.  rows: held-out rows of each cell.

    found: runs with their cells, as scored.  left_out: why other cells of the grid cannot be.  complete: all is scored.
    """

    runs: Sequence[Trained]
    swept: Sequence[str]
    rows: int
    found: list[tuple[Trained, Recall]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    complete: bool = False

    def plain(self) -> dict[str, Any]:
        """What recall.json holds."""
        return {
            "format_version": 1,
            "swamla_version": __version__,
            "complete": self.complete,
            "left_out": self.left_out,
            "runs": [
                {
                    "run": run.name,
                    "checkpoint": run.step,
                    "precision": run.precision,
                    "pattern": list(run.model.config.pattern),
                    "parameters": count_parameters(run.model.config).total,
                    "trained_on": str(run.task),
                    f"steps_to_{KNOWN:g}": run.steps,
                    "cells": [_plain(one) for one in self.of(run)],
                }
                for run in self.runs
            ],
        }

    def of(self, run: Trained) -> list[Recall]:
        """The cells of a run."""
        return [one for whose, one in self.found if whose is run]

    def write(self, folder: Path) -> None:
        """Write recall.json, recall.csv and recall.png."""
        folder.mkdir(parents=True, exist_ok=True)
        plain = self.plain()
        write_text_atomically(folder / "recall.json", json.dumps(plain, indent=2) + "\n")
        write_text_atomically(folder / "recall.csv", _csv(plain))
        title = f"{self.runs[0].task.kind}: accuracy on {self.rows:,} held-out rows"
        drawn = {label: cells for run, label in self._labelled() if (cells := self.of(run))}
        figure = draw_recall(drawn, self.swept, title=title + " (stopped early)" * (not self.complete))
        figure.savefig(folder / "recall.png")

    def show(self, console: Console) -> None:
        """Print the table, and at which step each run's evaluations had `KNOWN`."""
        say_wrapped(console, self._common())
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
        table.add_column("run", overflow="fold")
        for heading in (*self.swept, "accuracy", "95 % interval", "queries", "state (fp32)"):
            table.add_column(heading, justify="right", no_wrap=True)
        for run, label in self._labelled():
            for index, one in enumerate(self.of(run)):
                low, high = one.score.interval
                table.add_row(
                    Text("" if index else label),
                    *(str(getattr(one.task, name)) for name in self.swept),
                    f"{one.score.accuracy:.3f}",
                    f"{low:.3f} … {high:.3f}",
                    f"{one.score.queries:,}",
                    short(one.state_bytes, "B"),
                )
        console.print(table)
        for run, label in self._labelled():
            if run.evaluated:
                when = "in no evaluation of" if run.steps is None else f"by step {run.steps:,} of"
                say_wrapped(console, f"{label}: accuracy {KNOWN:g} {when} its training, on {run.task}")

    def _common(self) -> str:
        """The task and the sizes that all cells share, in words."""
        tasks = [one.task for _, one in self.found]
        shared = [
            f"{size.name} {getattr(tasks[0], size.name)}"
            for size in fields(tasks[0])
            if len({getattr(task, size.name) for task in tasks}) == 1
        ]
        precisions = " and ".join(dict.fromkeys(run.precision for run in self.runs))
        fewer = any(one.score.rows < self.rows for _, one in self.found)  # the task has no more different ones
        count = f"{'at most ' * fewer}{self.rows:,} held-out rows a cell"
        return f"{', '.join([tasks[0].kind, *shared])}; {count}, in {precisions}"

    def _labelled(self) -> list[tuple[Trained, str]]:
        """Each run with the name of its folder, or the whole path where names are the same."""
        names = [Path(run.name).resolve().name for run in self.runs]
        alone = len(set(names)) == len(names)
        return [(run, name if alone else run.name) for run, name in zip(self.runs, names, strict=True)]


def _plain(one: Recall) -> dict[str, Any]:
    score = one.score
    low, high = score.interval
    return {
        "sizes": {size.name: getattr(one.task, size.name) for size in fields(one.task)},
        "accuracy": score.accuracy,
        "low": low,
        "high": high,
        "right": score.right,
        "queries": score.queries,
        "rows": score.rows,
        "independent_trials": score.trials,
        "state_bytes": one.state_bytes,
    }


def _csv(plain: dict[str, Any]) -> str:
    """One line a cell: its run, the sizes of its task, the score and the bytes."""
    lines = []
    for run in plain["runs"]:
        about = {name: run[name] for name in ("run", "checkpoint", "parameters", f"steps_to_{KNOWN:g}")}
        task = {"task": run["trained_on"].partition("?")[0]}
        for cell in run["cells"]:
            score = {name: value for name, value in cell.items() if name != "sizes"}
            lines.append({**about, **task, **cell["sizes"], **score})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
