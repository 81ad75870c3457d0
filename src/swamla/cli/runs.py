"""`swamla runs [FOLDER]`: the runs in a folder, their data, progress, losses; `swamla runs rm NAME…` removes runs."""

import json
import os
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from swamla.checkpoint import list_checkpoints, read_run_config
from swamla.cli.asking import confirmed, remove, size_of
from swamla.cli.console import Console, say
from swamla.cli.flags import argument, parse
from swamla.cli.info_tables import short
from swamla.cli.running import checked
from swamla.config import did_you_mean, from_plain
from swamla.data.caching import short_source
from swamla.data.config import DataConfig
from swamla.errors import SwamlaError, UsageError
from swamla.model.accounting import count_parameters
from swamla.train import RunConfig
from swamla.train.claims import RUN_FILES, claim_to_remove, is_running
from swamla.train.tracking.metrics import read_metrics

State = Literal["running", "done", "stopped", "no save"]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The runs in a folder, most recently modified first. `swamla runs rm NAME …` removes runs (see its --help).

    folder: a folder of runs, or one run.
    json: print a JSON list.
    """

    folder: str = argument("runs", positional=True)
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Remove:
    """Remove runs, with their checkpoints, after asking. Prepared data stays in the cache (swamla cache list).

    runs: names of runs, as `swamla runs` lists them.
    folder: the folder of the runs; nothing outside it is removed, and no link is followed.
    yes: do not ask.
    """

    runs: tuple[str, ...] = argument(annotation=str, positional=True, repeated=True)
    folder: str = "runs"
    yes: bool = argument(False, switch=True)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A row. loss: the last one of training.  held_out_loss: the lowest, with its bits_per_byte or, of a task, its
    accuracy.  "no save": a run without a checkpoint."""

    name: str
    path: str
    data: str
    tokenizer: str
    pattern: str
    parameters: int
    steps: int
    tokens: int
    loss: float | None
    held_out_loss: float | None
    bits_per_byte: float | None
    accuracy: float | None
    modified: float
    state: State


def main(argv: list[str]) -> int:
    """List runs, or remove some."""
    if argv[:1] == ["rm"]:
        return _remove(argv[1:])
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


def _remove(argv: list[str]) -> int:
    """Remove the named runs, all or, if one of them cannot be, none."""
    arguments, _ = parse(Remove, argv, command="swamla runs rm")
    if not arguments.runs:
        raise UsageError("RUNS is missing: swamla runs rm NAME … removes them; swamla runs lists them")
    folder, console = checked(arguments.folder), Console()
    paths = list(dict.fromkeys(_named(name, folder) for name in arguments.runs))
    with ExitStack() as locks:
        for path in paths:
            locks.enter_context(claim_to_remove(path))
        told = [f"{path} ({short(size_of(path), 'B')}{_others(path)})" for path in paths]
        if not confirmed(f"Remove {', '.join(told)}?", yes=arguments.yes):
            say(console, "nothing was removed")
            return 0
        for path, what in zip(paths, told, strict=True):
            remove(path)
            say(console, f"removed {what}")
    return 0


def _named(name: str, folder: Path) -> Path:
    """The folder of the run NAME, or folder/NAME, in `folder`. Raises `UsageError` for anything else."""
    plain = os.path.normpath(checked(name))
    if os.path.dirname(plain) == os.path.normpath(folder):
        plain = os.path.basename(plain)
    if os.path.basename(plain) != plain or plain in (".", ".."):
        raise UsageError(f"{name}: not in {folder}; runs rm removes runs of one folder, named by --folder")
    path = folder / plain
    if path.is_symlink():
        raise UsageError(f"{path}: is a link to {path.resolve()}, which runs rm does not follow; remove it yourself")
    if not path.exists():
        there = sorted(p.name for p in folder.iterdir() if _is_run(p)) if folder.is_dir() else []
        known = did_you_mean(plain, there) if there else f"there is no run in {folder}"
        raise UsageError(f"{path}: no such run; {known}")
    if not _is_removable(path):
        raise UsageError(f"{path}: not a run of swamla, so it is not removed")
    return path


def _is_removable(path: Path) -> bool:
    """Whether a folder is a run by its config.json, which another program may write too, or by a run's other files."""
    try:
        read_run_config(path)
    except SwamlaError:  # damaged, or another program's
        return (path / "metrics.jsonl").is_file() and (path / "data.json").is_file()
    except OSError:
        return False
    return True


def _others(path: Path) -> str:
    """Names of what training does not write, to be told before it is removed."""
    names = sorted(entry.name for entry in path.iterdir() if entry.name not in RUN_FILES)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f", with {', '.join(names[:3])}{more}, not of its training" if names else ""


def _data(config: DataConfig) -> str:
    """The source of a run's data, or those of a mixture."""
    return " + ".join(part.source for part in config.sources)


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
        data=_data(config.data),
        tokenizer=config.data.tokenizer,
        pattern=compress(config.model.pattern),
        parameters=count_parameters(config.model).total,
        steps=records[-1]["step"] if records else 0,
        tokens=steps[-1]["tokens"] if steps else 0,
        loss=steps[-1]["loss"] if steps else None,
        held_out_loss=best.get("held_out_loss"),
        bits_per_byte=best.get("held_out_bits_per_byte"),
        accuracy=best.get("held_out_accuracy"),
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
    """Two lines a run, of at most 60 columns."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("run\npattern", overflow="fold", min_width=15, max_width=30)
    table.add_column("data\ntokenizer", overflow="fold", min_width=9, max_width=30)
    for heading in ("params\nsteps", "loss\ntokens", "held\nbits/B"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state\nwhen", no_wrap=True)
    for run in runs:
        data = " + ".join(short_source(part) for part in run.data.split(" + "))
        table.add_row(
            Text(f"{run.name}\n{run.pattern}"),
            Text(f"{data}\n{short_source(run.tokenizer)}"),
            f"{_short(run.parameters)}\n{_short(run.steps)}",
            f"{_figure(run.loss)}\n{_short(run.tokens)}",
            f"{_figure(run.held_out_loss)}\n{_score(run)}",
            f"{run.state}\n{age(now, run.modified)}",
        )
    return table


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _score(run: Run) -> str:
    """Bits per byte, or of a task the share of right answers."""
    return _figure(run.bits_per_byte) if run.accuracy is None else f"{100 * run.accuracy:.1f} %"


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
