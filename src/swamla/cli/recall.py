"""`swamla recall RUN …`: accuracy in a task over a grid of its sizes, beside the bytes of state.

The table, and the files: `recall_report.py`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from swamla.checkpoint import find_checkpoint, load
from swamla.cli.console import Console, program, say, say_wrapped
from swamla.cli.flags import Flag, argument, field_docs, parse
from swamla.cli.progress import shown_progress
from swamla.cli.recall_report import Report, Trained
from swamla.cli.running import checked, run_folder, writable
from swamla.errors import ConfigError, UsageError
from swamla.evaluate import recall
from swamla.evaluate.recall_grid import grid, require_fits, steps_to
from swamla.registry import members_of
from swamla.tasks import PREFIX, Task
from swamla.tasks import parse as parse_task
from swamla.train.changes import config_of
from swamla.train.precision import autocast, resolve_as_trained, resolve_device
from swamla.train.tracking.metrics import read_metrics


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Accuracy of runs in the task that they were trained on, over a grid of its sizes, beside the bytes of state.

    runs: folders of runs, or their names under runs/.
    task: the task, and perhaps sizes for all cells, as in "mqar?power=1"; by default the first run's. Sizes that are
        not given are those of each run.
    examples: held-out rows of each cell; no run was trained on them.
    checkpoint: best, latest, or a step.
    output: the folder of recall.json, recall.csv and recall.png.
    json: print what recall.json holds instead of the table.
    """

    runs: tuple[str, ...] = argument(annotation=str, positional=True, repeated=True)
    task: str = ""
    examples: int = 512
    checkpoint: str = "best"
    output: str = argument("recall", short="o", metavar="DIR")
    json: bool = False


def main(argv: list[str]) -> int:
    """Score the grid, write the files and print the table. A stop keeps what was scored until then."""
    arguments, given = parse(Arguments, argv, command="swamla recall", more=_size_flags())
    if arguments.examples < 1:
        raise UsageError(f"--examples {arguments.examples}: must be > 0, e.g. 512")
    folder = checked(arguments.output)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder}: is a file; name a folder, which may be a new one")
    sizes = {name: list(dict.fromkeys(values)) for name, values in given.items() if name in _size_flags()}
    runs = [_trained(path, arguments.checkpoint) for path in dict.fromkeys(map(run_folder, arguments.runs))]
    report = Report(runs=runs, swept=[name for name in sizes if len(sizes[name]) > 1], rows=arguments.examples)
    plan = _plan(report, arguments.task, sizes)
    with writable(folder):
        try:
            _score(report, plan)
        except BaseException as stop:  # Ctrl-C, a signal or an error: what was scored took time
            if report.found:
                report.write(folder)
                stop.add_note(f"{len(report.found)} of {len(plan)} cells are scored, and in {folder}")
            raise
        report.complete = True
        report.write(folder)
    if arguments.json:
        print(json.dumps(report.plain()))
        return 0
    report.show(Console())
    say(Console(), f"recall.json, recall.csv and recall.png are in {folder}")
    return 0


def _size_flags() -> dict[str, Flag]:
    """A flag for each size of any task, whose values make the grid; its help says what it is in which tasks."""
    helps: dict[str, dict[str, list[str]]] = {}
    for kind, cls in members_of(Task).items():
        for size in fields(cls):  # type: ignore[arg-type]
            helps.setdefault(size.name, {}).setdefault(field_docs(cls).get(size.name, ""), []).append(kind)
    return {
        name: Flag(
            name=name,
            annotation=tuple[str, ...],
            help="; ".join(f"{', '.join(kinds)}: {text}" for text, kinds in texts.items()),
            metavar="A,B,…",
            group="sizes of the task, one value or several",
        )
        for name, texts in helps.items()
    }


def _trained(folder: Path, checkpoint: str) -> Trained:
    """A run that was trained on a task, with its model. Raises `UsageError` for another one."""
    config = config_of(folder)
    if (task := config.data.task) is None:
        ours = f"recall is for runs of a task, such as {program()} train toy-mqar"
        raise UsageError(f"{folder}: was trained on {config.data.source}, and {ours}")
    found = find_checkpoint(folder, checkpoint)
    model, _ = load(folder, str(found.step), device=resolve_device("auto"))
    metrics = folder / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.is_file() else []
    return Trained(
        name=str(folder),
        step=found.step,
        precision=resolve_as_trained(config.train.precision, str(found.state.get("precision", "")), model.device),
        task=task,
        model=model,
        steps=steps_to(records),
        evaluated=any("held_out_accuracy" in record for record in records),
    )


def _plan(report: Report, asked: str, sizes: Mapping[str, Sequence[str]]) -> list[tuple[Trained, Task]]:
    """Each run with each task of the grid that can be and that fits it; the others are told, and why.

    Raises `UsageError` for a task that a run was not trained on, and the reason if a run has no cell.
    """
    plan: list[tuple[Trained, Task]] = []
    kind, _, query = (asked or report.runs[0].task.kind).removeprefix(PREFIX).partition("?")
    parse_task(kind)
    for run in report.runs:
        if kind != run.task.kind:
            trained = f"{run.name} was trained on {run.task.kind}, and ids of another task mean other things"
            if not asked:
                first = f"{report.runs[0].name} on {kind}"
                raise UsageError(f"{trained}; {first}: score the runs of one task at a time")
            raise UsageError(f"--task {kind}: {trained}: --task {run.task.kind}")
        named = {name: [value] for name, _, value in (part.partition("=") for part in query.split("&") if part)}
        fitting: list[tuple[Trained, Task]] = []
        errors: list[ConfigError | UsageError] = []
        for task in grid(run.task, {**named, **sizes}):
            try:
                if isinstance(task, ConfigError):
                    raise task
                _require_same_ids(run, task)
                require_fits(run.model, task)
                fitting.append((run, task))
            except (ConfigError, UsageError) as error:
                errors.append(error)
        if not fitting:
            raise errors[0]
        report.left_out += list(map(str, errors))
        plan += fitting
    for reason in dict.fromkeys(report.left_out):
        say_wrapped(Console(stderr=True), f"left out: {reason}")
    return plan


def _require_same_ids(run: Trained, task: Task) -> None:
    """Raise `UsageError` if an id of the task means another thing than in the run's."""
    ours, theirs = task.names(), run.task.names()
    if list(ours) != list(theirs):
        what = f"{len(ours)} ids" if len(ours) != len(theirs) else "ids of other meanings"
        trained = f"{run.name} was trained on {len(theirs)} ids, by {PREFIX}{run.task}"
        raise UsageError(f"{PREFIX}{task}: has {what}, and {trained}: sizes that change the ids must stay")


def _score(report: Report, plan: Sequence[tuple[Trained, Task]]) -> None:
    """Score each run of the plan on its task, in the precision that it was trained in."""
    with shown_progress(Console(stderr=True)) as progress:
        for done, (run, task) in enumerate(plan):

            def show(share: float, done: int = done, stage: str = f"scoring, {run.name}, {task}") -> None:
                progress(stage, 0, 0, (done + share) / len(plan))

            with autocast(run.precision, run.model.device):
                report.found.append((run, recall(run.model, task, rows=report.rows, progress=show)))
