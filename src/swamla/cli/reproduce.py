"""`swamla reproduce nanogpt-mla`: a published comparison as a command, from the first run to its page."""

import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from swamla.cli.console import PLUGINS, Console, say, say_rows, say_wrapped
from swamla.cli.flags import argument, parse
from swamla.cli.outputs import going_on
from swamla.cli.overrides import flags
from swamla.cli.progress import shown_progress
from swamla.cli.run_config import Written
from swamla.cli.running import checked, read_data
from swamla.config import from_plain, to_plain
from swamla.data.config import DataConfig
from swamla.data.dataset import Dataset, TrainingData
from swamla.data.sources import located
from swamla.data.task_rows import TaskDataset
from swamla.data.units import available_cores
from swamla.errors import DataError, UsageError, require
from swamla.files import write_text_atomically
from swamla.interpret.sections import Verdict
from swamla.study.folder import (
    append_line,
    begin,
    note_program,
    opened,
    planning,
    read_lines,
    read_outcomes,
    source_commit,
)
from swamla.study.nanogpt_mla.figures import write_figures
from swamla.study.nanogpt_mla.measured import MEASURED, measure, prompts_of
from swamla.study.nanogpt_mla.page import page
from swamla.study.nanogpt_mla.plan import MIXERS, NAME, asked_for, configs, described, planned, text_of
from swamla.study.nanogpt_mla.result import result
from swamla.study.plan import Asked, Study
from swamla.study.running import run_study
from swamla.study.runs import Outcome, duration, predict
from swamla.study.statistics import scipy_stats
from swamla.train import RunConfig

_ARMS_OWN = ("pattern", "data", "tokenizer", "seed", "lr", "output_dir")  # not for --flags
PAGE, RESULT = "report.html", "result.json"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Reproduce a published comparison: train its arms with several seeds, measure them, and say where its claim holds.

    nanogpt-mla: does latent attention grow induction heads, as GPT-2's attention does? About eleven minutes of two
        cores.
    The same command goes on where it was stopped, whatever stopped it; a run that has ended is not repeated.

    name: which comparison.
    output: its folder: report.html (one page that needs no network), pictures, result.json, and the runs.
    seeds: of every arm but those of one seed, for time: the longest budget and the characters.
    data: the text whose characters are learned, a file or a folder; by default Shakespeare where it is already,
        else Python's own library.
    flags: flags of `swamla train` for all runs, as one text, to try it small: "--width 16 --steps 20".
    jobs: runs at a time, one thread each; 0 for as many as there are cores, and one on a GPU.
    plan: print the plan and the predicted time, and train nothing.
    """

    name: Literal["nanogpt-mla"] = argument(positional=True)
    output: str = argument("", short="o", metavar="DIR")
    seeds: int = 3
    data: str = argument("", metavar="FILE")
    flags: str = ""
    jobs: int = 0
    plan: bool = argument(False, switch=True)


@dataclass(frozen=True, kw_only=True)
class _OfRuns:
    """The flags of all runs."""


def main(argv: list[str]) -> int:
    """Plan, train what is left, measure what is new, and write the page."""
    arguments, _ = parse(Arguments, argv, command="swamla reproduce")
    scipy_stats()  # an error now, and not when all is trained
    require(arguments.jobs >= 0, "jobs", arguments.jobs, "must be >= 0; 0 takes all cores")
    folder = checked(arguments.output) if arguments.output else Path("studies") / NAME
    console = Console()
    with _naming_output():
        study = _study(arguments, folder, argv, console)
    config = study.arms[-1].config
    text = read_data(config.data, console)
    if text.fingerprint != study.data["fingerprint"]:
        raise DataError(
            f"{config.data.source}: the text changed since the study was planned: restore it, or name another --output"
        )
    jobs = arguments.jobs or (1 if torch.cuda.is_available() else available_cores())
    say_rows(console, described(study, folder, predict(study, read_outcomes(folder), jobs), jobs))
    if arguments.plan:
        return 0
    study = note_program(folder, lambda text: say_wrapped(console, f"warning: {text}"))
    with going_on(folder):
        _train(study, folder, jobs, console)
        measured = _measure(study, folder, text, console)
    command = shlex.join(["swamla", "reproduce", *argv])
    found = result(study, read_outcomes(folder), measured, prompts=prompts_of(text), command=command)
    pictures = write_figures(found, folder)
    write_text_atomically(folder / PAGE, page(found))
    write_text_atomically(folder / RESULT, json.dumps(found, ensure_ascii=False, allow_nan=False) + "\n")
    for each in found["verdicts"]:
        verdict = Verdict(**each)
        say_wrapped(console, f"{verdict.short}. {verdict.text}", label=f"{verdict.question} ", indent=2)
    say_wrapped(
        console, f"{folder / PAGE}: open it in a browser; beside it {RESULT}, {', '.join(pictures)}, and the runs"
    )
    return 0


@contextmanager
def _naming_output() -> Iterator[None]:
    """Messages of studies name the folder's flag, which is --output here."""
    try:
        yield
    except UsageError as error:
        raise UsageError(str(error).replace("`output_dir`", "`output`")) from error


def _study(arguments: Arguments, folder: Path, argv: list[str], console: Console) -> Study:
    """The study in the folder, or a new one: its text read, its arms sized and timed."""
    before = opened(folder)
    if before is not None and before.arms[0].name not in configs("stdlib", "byte"):
        raise UsageError(f"{folder}: holds another study: name another folder with --output")
    if before is not None and not arguments.data:
        source, tokenizer = before.arms[-1].config.data.source, before.arms[-1].config.data.tokenizer
    else:
        source, tokenizer = text_of(arguments.data, DataConfig(source="stdlib").cache)
    data = located(DataConfig(source=source, tokenizer=tokenizer))
    asked = asked_for(arguments.seeds, data.source, arguments.flags)
    study = opened(folder, asked)
    if study is None:
        with planning(folder):
            study = opened(folder, asked)  # which another process may have planned meanwhile
            if study is None:
                study = _planned(arguments, asked, data, argv, console)
                begin(folder, study)
                return study
    say(console, f"going on with the study in {folder}")
    return study


def _planned(arguments: Arguments, asked: Asked, data: DataConfig, argv: list[str], console: Console) -> Study:
    wanted = {name: _changed(config, arguments.flags) for name, config in configs(data.source, data.tokenizer).items()}
    parse(Arguments, argv, command="swamla reproduce")  # messages name this command's flags again
    datasets: dict[str, TrainingData] = {}

    def dataset_of(config: RunConfig) -> TrainingData:
        source = config.data.source
        if source not in datasets:
            datasets[source] = TaskDataset(config.data.task) if config.data.task else read_data(config.data, console)
        return datasets[source]

    say(console, f"timing a few steps of {', '.join(MIXERS)} …")
    plugins = tuple(str(Path(file).resolve()) for file in PLUGINS)
    return planned(asked, wanted, dataset_of, plugins=plugins, commit=source_commit())


def _changed(config: RunConfig, text: str) -> RunConfig:
    """The config with the flags of all runs. Raises `UsageError` and `ConfigError`, which name the flag."""
    words = (word for word in shlex.split(text) if word.startswith("--"))
    written = {word.partition("=")[0][2:].replace("-", "_") for word in words}
    if named := [name for name in _ARMS_OWN if name in written]:
        raise UsageError(f"--flags {text!r}: --{named[0]} is a setting of the arms: leave it out")
    _, given = parse(_OfRuns, shlex.split(text), command="swamla train", more=flags())
    plain = to_plain(config)
    origins: Mapping[str, str] = Written(plain=plain, place=lambda field: "", spare={}, begun=None).apply(given)
    return from_plain(RunConfig, plain, origin=lambda field: origins.get(field, ""))


def _train(study: Study, folder: Path, jobs: int, console: Console) -> None:
    """Train what is left, with a line for every run that ends."""

    def report(outcome: Outcome) -> None:
        outcomes = read_outcomes(folder)
        left = predict(study, outcomes, jobs)
        time = f", {duration(left.seconds)} left" if left.runs else ""
        why = "" if outcome.status == "finished" else f": {outcome.status} ({outcome.error})"
        done = f"[{len(outcomes)}/{len(outcomes) + left.runs}]"
        say_wrapped(console, f"{done} {outcome.run}{why} after {outcome.wall:.0f} s{time}")

    run_study(folder, jobs=jobs, report=report)


def _measure(study: Study, folder: Path, text: Dataset, console: Console) -> list[dict[str, Any]]:
    """The figures of every finished run; of those that have none yet they are measured now, and kept at once."""
    outcomes = [one for one in read_outcomes(folder).values() if one.status == "finished"]
    task = study.arms[0].config.data.task
    assert task is not None
    torch.set_num_threads(study.asked.threads)
    known = {row["run"] for row in read_lines(folder, MEASURED)}
    with shown_progress(Console(stderr=True)) as progress:
        for done, outcome in enumerate(outcomes):
            progress(f"measuring, {outcome.run}", 0, 0, (done + 0.01) / len(outcomes))
            if outcome.run not in known:
                append_line(folder / f"{MEASURED}.jsonl", measure(folder, outcome, task, text))
    wanted = {outcome.run for outcome in outcomes}
    rows = {row["run"]: row for row in read_lines(folder, MEASURED) if row["run"] in wanted}
    order = [arm.name for arm in study.arms]
    return sorted(rows.values(), key=lambda row: (order.index(f"{row['experiment']}-{row['mixer']}"), row["seed"]))
