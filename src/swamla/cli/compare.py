"""`swamla compare STUDY`, `swamla compare mha "swa swa mla" …`: from a question to a verdict with intervals.

Of two finished runs: `compare_runs.py`.
"""

import shlex
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from rich import box
from rich.table import Table

from swamla.cli import compare_runs
from swamla.cli.console import PLUGINS, Console, program, say, say_rows, say_wrapped
from swamla.cli.flags import WIDEST, argument, parse, peek
from swamla.cli.outputs import going_on
from swamla.cli.overrides import flags
from swamla.cli.prepare import executor_settings, refuse_idle
from swamla.cli.run_config import resolve
from swamla.cli.running import checked, describe_data, read_data
from swamla.config import from_plain, load_file
from swamla.data.config import DataConfig
from swamla.data.dataset import TrainingData
from swamla.data.preparing import Part
from swamla.data.task_rows import TaskDataset
from swamla.data.units import available_cores
from swamla.errors import ConfigError, UsageError, require
from swamla.recipes import ALIASES, recipe_names
from swamla.studies import study_names, study_path
from swamla.study.evidence import Evidence, measure, with_closing
from swamla.study.folder import (
    STUDY,
    begin,
    note_program,
    opened,
    planning,
    read_outcomes,
    read_tests,
    require_planned,
    source_commit,
    waited_for,
)
from swamla.study.page.report import REPORT, write_report
from swamla.study.plan import Asked, Study, median_steps, resolve_study, slug_of
from swamla.study.results import Results
from swamla.study.running import beside, run_study, with_start
from swamla.study.runs import Outcome, command, describe, duration, predict, ready, seed_runs
from swamla.study.scoring import executor_of, score_tests
from swamla.study.statistics import scipy_stats
from swamla.train import RunConfig

# quickstart is bounded by time and as large as the machine is fast; a study of it is of one size, and many runs.
SIZES = {"quickstart": "--width 128 --n_heads 2 --batch_size 8 --block_size 256 --ngram_buckets none"}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare models: train each alike, at its best learning rate, with several seeds, and say what differs. Or compare
    two finished runs, see below.

    The same command goes on where a study was stopped, whatever stopped it.

    arms: a shipped study, or a file STUDY.toml, or two or more arms, each a pattern such as "swa swa mla"; all others
        are compared with the first.
    recipe: of all arms, a shipped one or a file.
    flags: flags of `swamla train` for all arms, as one text: "--width 64 --n_heads 1".
    question: what the study shall answer.
    match: what all arms have alike, by the widths of their FFNs: parameters (without embeddings, ±1 %), flops (of
        training, ±2 %), state (bytes, ±5 %, by windows and ranks too), seconds (of training, by their steps), or none.
    margin: a difference that is too small to matter, in bits per byte, or in accuracy of a task.
    tokens: of a run; by default the recipe's steps, or 1,200,000 where it is bounded by time.
    seeds: fresh seeds of every arm at its best learning rate.
    rates: search, or recipe for the recipe's learning rate in every arm.
    threads: CPU threads of a run.
    sizes: widths at which all of it is repeated, e.g. 128,256, or how many, each twice the last: 2.
    larger_seeds: fresh seeds of every size but the smallest.
    output_dir: the study's folder; by default studies/NAME.
    plan: print the plan and the commands of the first runs, and train nothing.
    report: write the results and the page of a study that has ended anew, from its folder alone, and run nothing.
    jobs: runs at a time; 0 for as many as there are cores for their threads, and one on a GPU.
    part: i/N: one of N such commands that work on one --output_dir, also on several machines that share it.
    executor: local, slurm or ray: work in --parts processes of this executor of datatrove (pip install 'swamla[data]').
    parts: the number of processes for --executor.
    executor_options: its further arguments: "time=04:00:00 partition=cpu".
    """

    arms: tuple[str, ...] = argument(annotation=str, positional=True, repeated=True)
    recipe: str = "quickstart"
    flags: str = ""
    question: str = ""
    match: Literal["parameters", "flops", "state", "seconds", "none"] = "parameters"
    margin: float = 0.01
    tokens: int | None = None
    seeds: int = 5
    rates: Literal["search", "recipe"] = "search"
    threads: int = 1
    sizes: tuple[int, ...] = ()
    larger_seeds: int | None = None
    output_dir: str = argument("", metavar="FOLDER")
    plan: bool = argument(False, switch=True)
    report: bool = argument(False, switch=True)
    jobs: int = 0
    part: str = argument("", metavar="i/N")
    executor: str = ""
    parts: int = 0
    executor_options: str = ""


_ENDS = "a run ends after the study's `tokens`, or else the recipe's `steps`"
_SCORED = "a run is scored once, at its end, on the validation part"
# Flags of `swamla train` that would change nothing, as `budget` sets what they name, and why.
DECIDED = {
    "seed": "its runs have seed 0 in the search, and then 1 to as many as its `seeds`",
    "threads": "it has `threads` of its own",
    **dict.fromkeys(("max_minutes", "schedule_steps", "schedule_minutes"), _ENDS),
    **dict.fromkeys(("save_interval", "keep_last", "async_save"), "a run saves four times, and keeps the last one"),
    **dict.fromkeys(("eval_interval", "eval_seconds", "eval_tokens", "eval_part"), _SCORED),
    **dict.fromkeys(
        ("tensorboard", "profile", "wandb_project", "wandb_run_name", "hf_repo_id"), "its runs publish nothing"
    ),
}
_ASKED = {field.name for field in fields(Asked)}  # keys of STUDY.toml; those that are flags too win over it


@dataclass(frozen=True, kw_only=True)
class _OfArm:
    """The flags of an arm."""


def main(argv: list[str]) -> int:
    """Plan, train what is left, score the test part once, and print the verdict."""
    of_study = {field.name for field in fields(Arguments)} - {field.name for field in fields(compare_runs.Arguments)}
    words, named = peek(argv, compare_runs.Arguments, Arguments, more=compare_runs.own_flags())
    if compare_runs.names_runs(words, study=bool(named & of_study)):
        return compare_runs.main(argv, sorted(of_study))
    epilog = _epilog()
    arguments, given = parse(Arguments, argv, command="swamla compare", explain=lambda word: ({}, epilog))
    scipy_stats()  # an error now, and not when all is trained
    require(arguments.jobs >= 0, "jobs", arguments.jobs, "must be >= 0; 0 takes all cores")
    part = Part.parse(arguments.part) if arguments.part else None
    if part is not None and not part.count:
        raise UsageError(f"--part {arguments.part}: must be i/N, e.g. 1/4")
    refuse_idle(given, ("part", "jobs"))
    if arguments.report:
        _report(arguments, given)
        return 0
    asked, name = _asked(arguments, given)
    folder = checked(arguments.output_dir) if arguments.output_dir else Path("studies") / name
    console = Console()
    study, dataset = _study_in(folder, asked, arguments.jobs, console, argv)
    jobs = 1 if arguments.executor else arguments.jobs or _free_jobs(study.arms[0].config, study.asked)
    parts = max(1, arguments.parts, part.count if part else 1)
    say_rows(console, describe(study, folder, read_outcomes(folder), jobs, parts))
    if arguments.plan:
        _say_commands(console, study, folder)
        return 0
    study = note_program(folder, lambda text: say_wrapped(console, f"warning: {text}"))
    if arguments.executor:
        settings = executor_settings(arguments.executor_options)
        executor_of(folder, study, arguments.executor, arguments.parts, settings).run()
        say_wrapped(console, f"handed the study to {arguments.executor}; the same command without --executor shows it")
        return 0
    with going_on(folder):
        _train(study, folder, jobs, part, console)
        say(console, "scoring the runs of all seeds on the test part of the held-out text …")
        tests = score_tests(folder, dataset)
        outcomes = read_outcomes(folder)
        evidence = measure(folder, study, outcomes, dataset, lambda text: say(console, text))
    _write(Results.of(study, outcomes, tests, evidence), folder, console)
    return 0


def _epilog() -> str:
    """What the help says below the flags: names of shipped studies, and how two runs are compared."""
    width = min(WIDEST, shutil.get_terminal_size().columns - 2)
    said = f"Shipped studies: {', '.join(study_names())}.", compare_runs.help_of_runs()
    return "\n\n".join(textwrap.fill(text, width) for text in said)


def _report(arguments: Arguments, given: Mapping[str, Any]) -> None:
    """Write the results of a study that has ended anew. Raises `UsageError` for one that has not."""
    first = Path(arguments.arms[0])
    if others := sorted(given.keys() - {"arms", "report"}) or arguments.arms[1:]:
        raise UsageError(f"--report takes the study's folder, or its file, alone: leave {others[0]} out")
    is_shipped = str(first) in study_names()
    is_file = first.suffix in (".toml", ".json") or is_shipped
    folder = Path("studies") / first.stem if is_file else first
    # Figures of others may have been added to its file, if that is still there.
    asked = _asked(arguments, given)[0] if is_shipped or (is_file and first.is_file()) else None
    try:
        study = opened(folder, asked)
    except UsageError as error:
        if opened(folder) is None:
            raise
        raise UsageError(
            f"{first} asks for another study than {folder} holds, if no flags stand beside it: name the folder, "
            f"swamla compare {shlex.quote(str(folder))} --report"
        ) from error
    if study is None:
        raise UsageError(f"{folder}: holds no study (it has no study.json)")
    outcomes, tests = read_outcomes(folder), read_tests(folder)
    finished = [one.run for one in seed_runs(study, outcomes).values() if one.status == "finished"]
    if ready(study, outcomes) or not {test.run for test in tests} >= set(finished):
        raise UsageError(f"{folder}: the study has not ended: the command that began it goes on, and writes its report")
    _write(Results.of(study, outcomes, tests, Evidence.read(folder, study, outcomes)), folder, Console())


def _write(results: Results, folder: Path, console: Console) -> None:
    with waited_for(folder, "report"):  # parts that end together write the same files
        written = write_report(results, folder)
    _say_results(console, results)
    say_wrapped(console, f"all of it is in {folder}: {', '.join(file.name for file in written)}, and the runs")
    say(console, f"{folder / REPORT}: open it in a browser")


def _asked(arguments: Arguments, given: Mapping[str, Any]) -> tuple[Asked, str]:
    """What is asked for, by a file or by arms, and flags; and the study's name."""
    first = arguments.arms[0]
    by_flags = {name: value for name, value in given.items() if name in _ASKED}
    if first in study_names() or first.endswith((".toml", ".json")):
        if arguments.arms[1:]:
            raise UsageError(f"{first} names its arms itself: leave {shlex.quote(arguments.arms[1])} out")
        file = study_path(first) if first in study_names() else Path(first)
        plain, place = load_file(file)
        recipe = plain.get("recipe")
        if isinstance(recipe, str) and recipe not in (*recipe_names(), *ALIASES):
            plain = plain | {"recipe": str((file.resolve().parent / Path(recipe).expanduser()).resolve())}
        name = file.stem
    else:
        if (Path(first) / STUDY).exists():
            raise UsageError(
                f"{first} is the folder of a study: the command that began it goes on with it (its file or arms, and "
                f"the same flags); swamla compare {shlex.quote(first)} --report writes its page anew"
            )
        twice = [arm for arm in arguments.arms if arguments.arms.count(arm) > 1]
        if twice:
            raise UsageError(f"the arm {twice[0]!r} is given twice")
        plain, place = {"arms": dict.fromkeys(arguments.arms, "")}, lambda field: ""
        name = "-vs-".join(map(slug_of, arguments.arms))[:80]
    if "recipe" in by_flags and by_flags["recipe"] not in (*recipe_names(), *ALIASES):
        by_flags["recipe"] = str(Path(by_flags["recipe"]).expanduser().resolve())
    if len(by_flags.get("sizes", ())) == 1:
        by_flags["sizes"] = by_flags["sizes"][0]
    plain = plain | by_flags
    plain.setdefault("flags", SIZES.get(plain.get("recipe", Asked.recipe), ""))

    def origin(field: str) -> str:
        of_table = first if field.startswith("published") else ""  # whose keys have no lines
        return f"--{field}" if field in by_flags else place(field) or of_table

    return from_plain(Asked, plain, origin=origin), name


def _study_in(
    folder: Path, asked: Asked, jobs: int, console: Console, argv: Sequence[str]
) -> tuple[Study, TrainingData]:
    """The study in a folder, planned and written if there is none yet, and its data."""
    study = opened(folder, asked)
    if study is None:
        with planning(folder):
            study = opened(folder, asked)  # which another process may have planned meanwhile
            if study is None:
                study, dataset = _planned(asked, jobs, console, argv)
                begin(folder, study)
                return study, dataset
    dataset = _data_of(study, console)
    say(console, f"going on with the study in {folder}")
    return study, dataset


def _planned(asked: Asked, jobs: int, console: Console, argv: Sequence[str]) -> tuple[Study, TrainingData]:
    """The study, resolved; its data is prepared and described, and steps of all arms are timed, beside other runs."""
    given = flags_of(asked)
    configs = {arm: config_of(asked, arm, given[arm]) for arm in asked.arms}
    parse(Arguments, argv, command="swamla compare")  # messages name this command's flags again
    first = next(iter(configs.values()))
    dataset = _read(first.data, console)
    describe_data(dataset, console, first.train.block_size, brief=True)
    say(console, "timing a few steps of every arm, and the start of a run …")
    plugins = tuple(str(Path(file).resolve()) for file in PLUGINS)
    others = (jobs or _free_jobs(first, asked)) - 1
    with TemporaryDirectory(prefix="swamla-compare-") as scratch, ExitStack() as under_way:

        def timed(matched: Mapping[str, RunConfig], dataset: TrainingData) -> dict[str, float]:
            under_way.enter_context(beside(next(iter(matched.values())), others, Path(scratch), plugins))
            return median_steps(matched, dataset)

        study = resolve_study(
            asked, configs, dataset, flags=given, plugins=plugins, commit=source_commit(), measure=timed
        )
        study = with_closing(with_start(study, Path(scratch)), dataset, Path(scratch) / "run")
        return replace(study, beside=others), dataset


def flags_of(asked: Asked) -> dict[str, str]:
    """The flags of each arm: those of all arms, then its own, or its name as the pattern.

    Where every arm has a pattern, all are repeated, or cut, to the length of the longest, unless a flag says the depth.
    Raises `UsageError` for a flag of which the study decides.
    """
    own = {name: given or f"--pattern {shlex.quote(name)}" for name, given in asked.arms.items()}
    patterns = [_given(name, words).get("pattern", "").replace(",", " ").split() for name, words in own.items()]
    found = {}
    for name in own:
        words = f"{asked.flags} {own[name]}"
        given = _given(name, words)
        decided = DECIDED | ({"steps": _ENDS} if asked.tokens else {})
        if named := [flag for flag in decided if flag in given]:
            raise UsageError(f"arm {name!r}: --{named[0]} does nothing in a study: {decided[named[0]]}; leave it out")
        depth = ["--n_layers", str(max(map(len, patterns)))] if all(patterns) and "n_layers" not in given else []
        found[name] = shlex.join(shlex.split(words) + depth)
    return found


def config_of(asked: Asked, arm: str, words: str) -> RunConfig:
    """The config of an arm's runs, from the recipe and its flags. Raises `UsageError`, naming the arm."""
    given = _given(arm, words)
    with _naming(arm):
        return resolve(asked.recipe, given, new=True).config


def _given(arm: str, words: str) -> dict[str, Any]:
    """Flags of `swamla train` with their values. Raises `UsageError`, naming the arm."""
    with _naming(arm):
        return parse(_OfArm, shlex.split(words), command="swamla train", more=flags())[1]


@contextmanager
def _naming(arm: str) -> Iterator[None]:
    """Errors name the arm."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(error.field, error.got, f"{error.allowed} (arm {arm!r})", error.origin, error.kind) from error
    except (UsageError, ValueError) as error:
        raise UsageError(f"arm {arm!r}: {error}") from error


def _read(config: DataConfig, console: Console) -> TrainingData:
    return TaskDataset(config.task) if config.task else read_data(config, console)


def _data_of(study: Study, console: Console) -> TrainingData:
    """The data of a study that goes on. Raises `DataError` if it is not what it was planned with."""
    dataset = _read(study.arms[0].config.data, console)
    require_planned(study, dataset)
    return dataset


def _free_jobs(config: RunConfig, asked: Asked) -> int:
    if torch.cuda.is_available() and config.train.device != "cpu":
        return 1
    return max(1, available_cores() // asked.threads)


def _say_commands(console: Console, study: Study, folder: Path) -> None:
    """The commands of the runs that can start now; others follow from their outcomes."""
    say(console, "the first runs, as ordinary commands:")
    for run in ready(study, read_outcomes(folder)):
        say(console, f"  {program()} {shlex.join(command(study, folder, run))}")


def _train(study: Study, folder: Path, jobs: int, part: Part | None, console: Console) -> None:
    """Train what is left, with a line for every run that ends."""
    place = (part.number - 1, part.count) if part else (0, 1)

    def report(outcome: Outcome) -> None:
        outcomes = read_outcomes(folder)
        left = predict(study, outcomes, jobs * place[1])
        unit = "nats an answer" if study.task else "bits per byte"
        found = f"{outcome.validation:.4f} {unit}" if outcome.validation is not None else outcome.status
        why = f" ({outcome.error})" if outcome.error else ""
        time = f", {duration(left.seconds)} left" if left.runs else ""
        what = f"{outcome.arm}, lr {outcome.lr:g}, seed {outcome.seed}: {found}{why}"
        say_wrapped(console, f"[{len(outcomes)}/{len(outcomes) + left.runs}] {what} after {outcome.wall:.0f} s{time}")

    run_study(folder, jobs=jobs, part=place[0], parts=place[1], report=report)


def _say_results(console: Console, results: Results) -> None:
    """The table, the verdict, and what it does not say."""
    heads, rows = results.table()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)  # as wide as 80 columns allow
    for number, head in enumerate(heads[:-1]):  # the last is in the sentences
        table.add_column(head, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row[:-1])
    console.print(table)
    for text in results.verdict():
        say_wrapped(console, text)
    say(console, "what this does not say:")
    for text in results.not_said():
        say_wrapped(console, text, label="- ", indent=2)
