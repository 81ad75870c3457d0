"""`swamla runs [FOLDER]`: the runs in a folder, their progress and losses."""

import json
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from swamla.checkpoint import list_checkpoints, read_run_config
from swamla.cli.console import Console, say
from swamla.cli.flags import argument, parse
from swamla.config import from_plain
from swamla.errors import SwamlaError, UsageError
from swamla.model.accounting import count_parameters
from swamla.train import RunConfig
from swamla.train.claims import is_running
from swamla.train.tracking.metrics import read_metrics

State = Literal["running", "done", "stopped", "no save"]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The runs in a folder, most recently modified first.

    folder: a folder of runs, or one run.
    json: print a JSON list.
    """

    folder: str = argument("runs", positional=True)
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Run:
    """A row. loss: the last one of training.  held_out_loss: the lowest, with its bits_per_byte.  "no save": a run
    without a checkpoint."""

    name: str
    path: str
    pattern: str
    parameters: int
    steps: int
    tokens: int
    loss: float | None
    held_out_loss: float | None
    bits_per_byte: float | None
    modified: float
    state: State


def main(argv: list[str]) -> int:
    """List runs."""
    arguments, _ = parse(Arguments, argv, command="swamla runs")
    runs, broken = _read(Path(arguments.folder))
    if arguments.json:
        rows = [
            asdict(run) | {"modified": datetime.fromtimestamp(run.modified).astimezone().isoformat()} for run in runs
        ]
        print(json.dumps(rows + [{"path": path, "broken": reason} for path, reason in broken.items()]))
        return 0
    console = Console()
    if runs:
        console.print(_table(runs, time.time()))
    for path, reason in broken.items():
        say(console, f"broken: {reason}" if path in reason else f"broken: {path}: {reason}")
    if not runs and not broken:
        say(console, f"no runs in {arguments.folder}")
    return 0


def _read(folder: Path) -> tuple[list[Run], dict[str, str]]:
    """The runs, and damaged folder → reason."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; swamla train writes runs to the folder runs")
    runs, broken = [], {}
    for path in [folder] if _is_run(folder) else sorted(p for p in folder.iterdir() if _is_run(p)):
        try:
            runs.append(summarize(path))
        except (SwamlaError, OSError) as error:
            broken[str(path)] = str(error)
    return sorted(runs, key=lambda run: run.modified, reverse=True), broken


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("config.json", "metrics.jsonl", "checkpoints"))


def summarize(path: Path) -> Run:
    """The row of a run's folder. Raises if its config or metrics are damaged."""
    plain = read_run_config(path)
    plain.pop("format_version")
    config = from_plain(RunConfig, plain, origin=str(path / "config.json"))
    file = path / "metrics.jsonl"
    records = read_metrics(file) if file.exists() else []
    steps = [r for r in records if "loss" in r]
    best = min(_evaluations(records), key=lambda r: r["held_out_loss"], default={})
    return Run(
        name=path.resolve().name,
        path=str(path),
        pattern=compress(config.model.pattern),
        parameters=count_parameters(config.model).total,
        steps=records[-1]["step"] if records else 0,
        tokens=steps[-1]["tokens"] if steps else 0,
        loss=steps[-1]["loss"] if steps else None,
        held_out_loss=best.get("held_out_loss"),
        bits_per_byte=best.get("held_out_bits_per_byte"),
        modified=(file if file.exists() else path / "config.json").stat().st_mtime,
        state=_state(path, config, records),
    )


def _evaluations(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Evaluations on the same number of held-out tokens as the last one; others are not comparable."""
    rescored = [
        {key.removeprefix("best_"): value for key, value in r.items()} for r in records if "best_held_out_loss" in r
    ]
    found = [r for r in (*rescored, *records) if r.get("held_out_loss") is not None]
    return [r for r in found if r.get("held_out_tokens") == found[-1].get("held_out_tokens")]


def _state(path: Path, config: RunConfig, records: list[dict[str, Any]]) -> State:
    if is_running(path):
        return "running"
    if not list_checkpoints(path / "checkpoints"):
        return "no save"
    elapsed = [r["elapsed"] for r in records if "elapsed" in r]
    step = max((later - earlier for earlier, later in pairwise(elapsed[-10:])), default=0.0)
    done = bool(elapsed) and config.train.budget.progress(records[-1]["step"] + 0.5, elapsed[-1] + 0.5 * step) >= 1
    return "done" if done else "stopped"


def compress(pattern: tuple[str, ...]) -> str:
    """The shortest cycle and its repetitions: "(swa swa mla)×4"."""
    count = len(pattern)
    length = next(n for n in range(1, count + 1) if count % n == 0 and pattern == pattern[:n] * (count // n))
    cycle = " ".join(pattern[:length])
    if length == count:
        return cycle
    return f"{cycle}×{count // length}" if length == 1 else f"({cycle})×{count // length}"


def _table(runs: list[Run], now: float) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("run", overflow="fold", max_width=24)
    table.add_column("pattern", overflow="fold", max_width=30)
    for heading in ("params", "steps", "tokens", "loss", "held", "bits/B", "when"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for run in runs:
        sizes = (_short(run.parameters), _short(run.steps), _short(run.tokens))
        losses = (_figure(run.loss), _figure(run.held_out_loss), _figure(run.bits_per_byte))
        table.add_row(run.name, run.pattern, *sizes, *losses, age(now, run.modified), run.state)
    return table


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _short(count: int) -> str:
    """At most three digits and a unit: 213M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size * 0.9995:
            return f"{count / size:.3g}{unit}"
    return str(count)


def age(now: float, then: float) -> str:
    """Elapsed time: 3 h."""
    seconds = max(0.0, now - then)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return "now"
