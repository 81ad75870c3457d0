"""`swamla checkpoint`: list, verify and convert a run's checkpoints."""

import json
import time
import warnings
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from swamla.checkpoint import best_step, convert_checkpoint, list_checkpoints, step_of, verify
from swamla.checkpoint.convert import WeightType
from swamla.cli.console import Console, say
from swamla.cli.flags import argument, parse
from swamla.cli.info_tables import short
from swamla.cli.running import checked, run_folder
from swamla.cli.runs import age
from swamla.config import did_you_mean
from swamla.errors import CorruptError, SwamlaError, UsageError

HELP = """usage: swamla checkpoint list RUN
       swamla checkpoint verify RUN|CHECKPOINT
       swamla checkpoint convert RUN FOLDER

list      the checkpoints of a run: step, size, age
verify    check every file against its manifest; exit
          status 3 and the file's name if one is damaged
convert   write one checkpoint with another number of
          shards, or its weights alone, as a new run folder

Each takes --json and --help."""


@dataclass(frozen=True, kw_only=True)
class List:
    """The checkpoints of a run, oldest first.

    run: the run's folder.
    verify: read every file and compare its SHA-256; otherwise only sizes are compared.
    json: print a JSON list.
    """

    run: str = argument(positional=True)
    verify: bool = False
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check every file of a checkpoint, or of all checkpoints of a run, against its manifest.

    path: a run's folder, or one checkpoint: RUN/checkpoints/step-00000500.
    json: print a JSON list.
    """

    path: str = argument(positional=True)
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write one checkpoint of a run, with another number of shards, as the only one of a new run folder.

    run: the run's folder.
    folder: the new run's folder, missing or empty.
    checkpoint: best, latest, or a step.
    shards: files per group, as fsdp saves them on that many processes; 1 for a single file.
    weights_only: only the weights, averaged if there are averages; a run cannot resume from them.
    dtype: of the matrices; other than fp32 only with --weights_only.
    json: print one JSON object.
    """

    run: str = argument(positional=True)
    folder: str = argument(positional=True)
    checkpoint: str = "best"
    shards: int = 1
    weights_only: bool = False
    dtype: WeightType = "fp32"
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """One checkpoint. state: "whole" (all files of the right size), "verified" (SHA-256 too), or the error."""

    path: str
    step: int
    bytes: int
    written: float
    best: bool
    latest: bool
    layout: str
    state: str
    damaged: bool


def main(argv: list[str]) -> int:
    """Run the action that the first word names."""
    actions = {"list": _list, "verify": _verify, "convert": _convert}
    action = argv[0] if argv else "--help"
    if action in ("-h", "--help"):
        print(HELP)
        return 0
    if action not in actions:
        raise UsageError(f"swamla checkpoint {action}: {did_you_mean(action, list(actions))}")
    return actions[action](argv[1:])


def _list(argv: list[str]) -> int:
    arguments, _ = parse(List, argv, command="swamla checkpoint list")
    run = run_folder(arguments.run)
    rows = _rows(_of_run(run), hashes=arguments.verify)
    if arguments.json:
        print(json.dumps([_plain(row) for row in rows]))
        return 0
    if not rows:
        say(Console(), f"no checkpoints in {run}")
        return 0
    Console().print(_table(rows, time.time()))
    return 0


def _verify(argv: list[str]) -> int:
    arguments, _ = parse(Verify, argv, command="swamla checkpoint verify")
    path = checked(arguments.path)
    paths = [path] if (path / "manifest.json").exists() or path.name.startswith("step-") else _of_run(path)
    if not paths or not path.is_dir():
        raise UsageError(f"{path}: there is no checkpoint to verify")
    rows = _rows(paths, hashes=True)
    if arguments.json:
        print(json.dumps([_plain(row) for row in rows]))
    else:
        for row in rows:
            say(Console(), f"{row.path}: {row.state}" if not row.damaged else f"damaged: {row.state}")
    damaged = [row.state for row in rows if row.damaged]
    if damaged:
        raise CorruptError(f"{len(damaged)} of {len(rows)} checkpoints damaged: {damaged[0]}")
    return 0


def _convert(argv: list[str]) -> int:
    arguments, _ = parse(Convert, argv, command="swamla checkpoint convert")
    folder = checked(arguments.folder)
    convert_checkpoint(
        run_folder(arguments.run),
        folder,
        which=arguments.checkpoint,
        shards=arguments.shards,
        weights_only=arguments.weights_only,
        dtype=arguments.dtype,
    )
    (row,) = _rows(_of_run(folder), hashes=True)
    if arguments.json:
        print(json.dumps(_plain(row)))
    else:
        say(Console(), f"{row.path}: {short(row.bytes, 'B')}, {row.layout}, {row.state}")
    return 0


def _of_run(run: Path) -> list[Path]:
    if not (run / "checkpoints").is_dir():
        raise UsageError(f"{run}: not a run folder (it has no folder checkpoints)")
    return list_checkpoints(run / "checkpoints")


def _rows(paths: list[Path], *, hashes: bool) -> list[Row]:
    directory = paths[0].parent if paths else Path()
    newest = list_checkpoints(directory)[-1:]
    try:
        best = best_step(directory)
    except CorruptError as error:
        warnings.warn(str(error), stacklevel=2)
        best = None
    return [_row(path, step_of(path) == best, path in newest, hashes) for path in paths]


def _row(path: Path, best: bool, latest: bool, hashes: bool) -> Row:
    """The row of a checkpoint, damaged or not."""
    layout, state, damaged = "–", "verified" if hashes else "whole", False
    try:
        layout = _layout(verify(path, hashes=hashes))
    except SwamlaError as error:
        state, damaged = str(error), True
    return Row(
        path=str(path),
        step=step_of(path),
        bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        written=path.stat().st_mtime,
        best=best,
        latest=latest,
        layout=layout,
        state=state,
        damaged=damaged,
    )


def _layout(manifest: dict[str, Any]) -> str:
    shards = sum(name.startswith("model/") for name in manifest["files"])
    return f"{shards} shards" if shards else "single file"


def _plain(row: Row) -> dict[str, Any]:
    return asdict(row) | {"written": datetime.fromtimestamp(row.written).astimezone().isoformat()}


def _table(rows: list[Row], now: float) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for heading in ("step", "size", "when"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("layout", no_wrap=True)
    table.add_column("state", overflow="fold")
    for row in rows:
        marks = " ".join(name for name, it_is in (("best", row.best), ("latest", row.latest)) if it_is)
        state = f"damaged: {row.state}" if row.damaged else row.state
        table.add_row(str(row.step), short(row.bytes, "B"), age(now, row.written), marks, row.layout, Text(state))
    return table
