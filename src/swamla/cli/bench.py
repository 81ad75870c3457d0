"""`swamla bench RECIPE`: the speed of training, generation, loader and start-up on this machine."""

import math
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from swamla import distributed
from swamla.bench.generation import NEW
from swamla.bench.measuring import ceilings, machine
from swamla.bench.recipe import Allowance, RecipeBench, Wanted
from swamla.bench.results import Results, Row, in_bytes
from swamla.cli.bench_tables import Screen
from swamla.cli.console import Console, say, say_wrapped
from swamla.cli.flags import argument, parse
from swamla.cli.overrides import flags
from swamla.cli.run_config import explain_recipe, read_recipe, with_vocabulary
from swamla.errors import Interrupted, SwamlaError, UsageError
from swamla.model.accounting import count_parameters
from swamla.model.compiling import resolve_compile
from swamla.train.backends import describe, fastest_paths, resolve_backends
from swamla.train.precision import measured_precision, resolve_device, resolve_precision

CTRL_C = 130


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The speed of a recipe on this machine: training, generation, loader, tokenizer, start-up; and the machine's peak
    rates. Uses random tokens, downloads nothing and starts no run.

    recipe: a shipped recipe, a .toml or .json file, or a run's folder; flags change it.
    out: write the figures and the machine to this file; it is complete after every row.
    minutes: the approximate time limit. Measurements that would exceed it are named and left out.
    lengths: also train on single rows of these lengths; or none.
    prompts: generate after prompts of these lengths; or none.
    output_dir, run_name, workers, verbose: no effect; accepted so that a training's command line can be used as it is.
    """

    recipe: str = argument("", positional=True, default="quickstart")
    out: str = argument("", metavar="FILE.json")
    minutes: float = 2.0
    lengths: str = argument("256,1024,4096,16384", metavar="N,N,…")
    prompts: str = argument("128,1024,8192", metavar="N,N,…")
    output_dir: str = argument("", usual=False)
    run_name: str = argument("", usual=False)
    workers: int = argument(0, usual=False)
    verbose: bool = argument(False, switch=True, usual=False)


@dataclass(kw_only=True)
class _Shown(Results):
    """Results that show each row when it is added."""

    screen: Screen = field()

    def add(self, table: str, row: Row) -> None:
        super().add(table, row)
        self.screen.row(table, row)


def main(argv: list[str]) -> int:
    """Measure and print."""
    arguments, given = parse(Arguments, argv, command="swamla bench", more=flags(), explain=explain_recipe)
    if distributed.launched():
        raise UsageError("bench is for one process; start it without torchrun")
    seconds, file = 60 * _minutes(arguments.minutes), _file(arguments.out)
    recipe = arguments.recipe or "quickstart"
    wanted = _wanted(recipe, arguments, given)
    console = Console()
    with Screen(console) as screen:
        results = _Shown(
            command=shlex.join(["swamla", "bench", *argv]), file=file, say=lambda line: None, screen=screen
        )
        try:
            _measure(recipe, wanted, results, seconds, console)
        except KeyboardInterrupt:
            kept = f"; what was measured is in {file}" if file and results.rows else ""
            raise Interrupted(f"interrupted{kept}", CTRL_C) from None
    say(console, "")
    say_wrapped(console, f"{results.seconds:.0f} s; {_LEGEND}")
    if file:
        say_wrapped(console, f"the figures are in {file}")
    return 0


_LEGEND = (
    "medians, ± half the distance between the quartiles. Packed rows (*) have many documents, the others one. Matmul: "
    "the model's FLOPs by the accounting, over the rate of large products here. Memory: the peak of training."
)


def _measure(recipe: str, wanted: Wanted, results: _Shown, seconds: float, console: Console) -> None:
    """Fill the results."""
    config, allowance = wanted.config, Allowance(seconds)
    paths, choices = fastest_paths(config.model, wanted.device, wanted.precision, length=config.train.block_size)
    config = replace(config, model=config.model.with_backends(paths))
    wanted = replace(wanted, config=config)
    backends = describe(resolve_backends(config.model, wanted.device, wanted.precision))
    parameters = count_parameters(config.model).total
    results.machine = machine()
    say_wrapped(console, f"{recipe}: {parameters:,} parameters, {wanted.precision} on {wanted.device.type}; {backends}")
    precision = measured_precision(wanted.device) if config.train.precision == "auto" else None
    for choice in ([precision] if precision else []) + choices:
        say_wrapped(console, str(choice))
    say_wrapped(console, _machine(results.machine))
    say_wrapped(console, f"{_about(seconds)} (--minutes); on random tokens, nothing is downloaded")
    results.screen.stage("the machine's peak rates")
    results.ceilings = ceilings(wanted.device, seconds=min(1.0, 0.01 * seconds))
    say_wrapped(console, _ceilings(results.ceilings))
    results.rows["model"] = [
        {
            "name": recipe,
            "parameters": parameters,
            "vocab_size": config.model.vocab_size,
            "precision": wanted.precision,
            "device": wanted.device.type,
            "backends": backends,
            "optimizer": config.train.optimizer.kind,
            "compile": resolve_compile(config.train.compile, wanted.device),
            "checkpointing": config.train.checkpointing,
        }
    ]
    results.save()
    with tempfile.TemporaryDirectory() as folder:
        RecipeBench(wanted, results, allowance, Path(folder), results.screen.stage).run()


def _about(seconds: float) -> str:
    return f"about {seconds:.0f} s" if seconds < 100 else f"about {seconds / 60:.3g} minutes"


def _machine(found: dict[str, object]) -> str:
    device = "" if found["device"] == "cpu" else f", {found['device']}"
    memory, cores = in_bytes(int(str(found["memory_bytes"]))), f"cores {found['cores']}"
    return f"{found['processor']}, {cores}, {memory}{device}; torch {found['torch']}, threads {found['threads']}"


def _ceilings(found: dict[str, float]) -> str:
    flops = [f"{name} {found[f'{name}_flops'] / 1e9:,.0f} GFLOP/s" for name in ("fp32", "bf16")]
    return f"large matrix products run at {' and '.join(flops)}, copies at {in_bytes(found['copy_bytes'])}/s"


def _wanted(recipe: str, arguments: Arguments, given: Mapping[str, Any]) -> Wanted:
    """What to measure. Raises for impossible requests."""
    run = Path(recipe) / "config.json"
    config = read_recipe(str(run) if run.is_file() else recipe, given)
    config = replace(config, model=with_vocabulary(config.model, config.data))
    device, positions = resolve_device(config.train.device), config.model.learned_positions
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)  # before backends are timed
    lengths = _numbers("lengths", arguments.lengths, positions, asked="lengths" in given)
    most = positions and positions - NEW + 1
    return Wanted(
        config=config,
        device=device,
        precision=resolve_precision(config.train.precision, device),
        lengths=lengths,
        prompts=_numbers("prompts", arguments.prompts, most, asked="prompts" in given),
        tokenizer=run.with_name("tokenizer.json") if run.is_file() else None,
    )


def _numbers(flag: str, text: str, most: int, *, asked: bool) -> tuple[int, ...]:
    """The numbers in a flag. Defaults above `most`, the number of learned positions, are left out; 0 is no limit."""
    if text == "none":
        return ()
    try:
        found = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise UsageError(f"--{flag} {text}: must be numbers above 0 with commas between, e.g. 256,1024, or none")
    if most and asked and max(found) > most:
        raise UsageError(f"--{flag} {text}: the model's learned positions leave room for {most} at most")
    return tuple(number for number in found if not most or number <= most)


def _minutes(minutes: float) -> float:
    if not (minutes > 0 and math.isfinite(minutes)):
        raise UsageError(f"--minutes {minutes}: must be > 0, e.g. 2")
    return minutes


def _file(out: str) -> Path | None:
    """The output file. Raises, before anything is measured, if it cannot be written."""
    if not out:
        return None
    file = Path(out)
    if "\0" in out or file.suffix != ".json":
        raise UsageError(f"--out {out!r}: must be the name of a .json file")
    if not file.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {file.parent}")
    if file.exists():
        try:
            Results.load(file)
        except (SwamlaError, OSError):
            raise UsageError(f"--out {out}: exists and has no results of bench: choose another file") from None
    return file
