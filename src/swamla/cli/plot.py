"""`swamla plot RUN …`: curves of several runs in one picture."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from swamla.cli.console import Console, say
from swamla.cli.flags import argument, parse
from swamla.cli.running import checked, run_folder
from swamla.config import did_you_mean
from swamla.errors import UsageError
from swamla.train.plot import plot_runs, read_curve
from swamla.train.tracking.metrics import read_metrics


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Draw training curves, raw ones faint and smoothed ones strong, with evaluations as marks.

    runs: folders of runs, or their names under runs/.
    output: the picture: .png, .pdf or .svg.
    x: the horizontal axis.
    y: the vertical axis: loss, held_out_loss, bits_per_byte, lr, grad_norm, or another name in metrics.jsonl.
    """

    runs: tuple[str, ...] = argument(annotation=str, positional=True, repeated=True)
    output: str = argument("curves.png", short="o", metavar="FILE")
    x: Literal["step", "tokens", "time"] = "step"
    y: str = "loss"


def main(argv: list[str]) -> int:
    """Draw, and print the file's name."""
    arguments, _ = parse(Arguments, argv, command="swamla plot")
    picture = checked(arguments.output)
    if picture.suffix not in (".png", ".pdf", ".svg"):
        raise UsageError(f"--output {picture}: must end in .png, .pdf or .svg")
    if not picture.parent.is_dir():
        raise UsageError(f"--output {picture}: there is no folder {picture.parent}")
    if not arguments.runs:
        raise UsageError("RUNS is missing: swamla plot RUN … draws them; swamla runs lists them")
    folders = [_folder(name) for name in arguments.runs]
    records = [read_metrics(folder / "metrics.jsonl") for folder in folders]
    curves = [
        read_curve(name, found, x=arguments.x, y=arguments.y)
        for name, found in zip(_names(folders), records, strict=True)
    ]
    drawn = [curve for curve in curves if curve.training or curve.held_out]
    for curve in curves:
        if curve not in drawn and len(drawn) > 0:
            raise UsageError(f"--y {arguments.y}: {curve.name} has none; leave that run out")
    if not drawn:
        raise UsageError(f"--y {arguments.y}: no run has it; {_suggest(arguments.y, records)}")
    plot_runs(drawn, picture, x=arguments.x, y=arguments.y)
    say(Console(), f"{picture}: {arguments.y} of {', '.join(curve.name for curve in drawn)}")
    return 0


def _folder(name: str) -> Path:
    """The folder of a run that has metrics."""
    folder = run_folder(name)
    if not (folder / "metrics.jsonl").is_file():
        raise UsageError(
            f"{folder}: no run (it has no metrics.jsonl), nor is there one in runs/; swamla runs lists them"
        )
    return folder


def _names(folders: list[Path]) -> list[str]:
    """Distinct names for the legend: the folders' names, with their parents' if two are the same."""
    names = [folder.resolve().name for folder in folders]
    alone = len(set(names)) == len(names)
    return names if alone else ["/".join(folder.resolve().parts[-2:]) for folder in folders]


def _suggest(y: str, records: list[list[dict[str, Any]]]) -> str:
    numbers = {key for found in records for record in found for key, value in record.items() if value is not None}
    return did_you_mean(y, sorted(numbers - {"step"}))
