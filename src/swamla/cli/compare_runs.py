"""`swamla compare RUN RUN`: two finished runs on the same documents, or on the same rows of a task."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from swamla.checkpoint import Checkpoint, find_checkpoint, list_checkpoints, load, step_of
from swamla.cli.console import Console, say, say_wrapped
from swamla.cli.evaluate import own_flags
from swamla.cli.flags import argument, parse
from swamla.cli.plain import BLOCK_PARTS
from swamla.cli.plot import distinct_names
from swamla.cli.progress import shown_progress
from swamla.cli.running import checked, run_folder, writable
from swamla.cli.scoring import Part, data_of_flag, own_data, precision_of, run_config, trained_on
from swamla.data.config import CHAT, TOKEN_IDS
from swamla.data.dataset import Dataset
from swamla.data.shards import Split
from swamla.data.task_rows import TaskDataset
from swamla.data.tokenizer import Tokenizer, load_tokenizer
from swamla.errors import DataError, UsageError
from swamla.evaluate import bytes_apart, part_of
from swamla.evaluate.held_out import EVALUATION_TOKENS
from swamla.files import read_json
from swamla.studies import study_names
from swamla.study.matching import Costs
from swamla.study.page.compared import setting_words, told_settings
from swamla.study.page.report import REPORT
from swamla.study.page.two_runs import write_report
from swamla.study.plan import slug_of
from swamla.study.statistics import scipy_stats
from swamla.study.two_results import COMPARED, Compared, Side
from swamla.study.two_runs import (
    Answers,
    Losses,
    answers,
    document_differences,
    encoded,
    kind_differences,
    paired,
    shares,
    text_losses,
    texts_of,
    token_differences,
)
from swamla.tasks import PREFIX
from swamla.tasks import parse as parse_task
from swamla.train import RunConfig
from swamla.train.init_from import RECORD, describe
from swamla.train.plot import read_curve
from swamla.train.precision import autocast
from swamla.train.run_folder import identity_of_run
from swamla.train.tracking.metrics import read_metrics
from swamla.version import __version__

_LN2 = 0.6931471805599453
_SHOWN = 8  # settings that differ, on the screen
_TWO = "compare takes two runs, or arms"
Progress = Callable[[float], None]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare two finished runs: what differs, what each predicts of the same documents, and where they differ most.

    Writes report.html (one page that needs no network), compared.json and CSV. Scores as `swamla evaluate` does.

    runs: two folders of runs, or their names under runs/.
    data: compare on this data, instead of the held-out text of the first run; or on other rows of a task.
    held_out: only the part of --data that the first run would hold out, by its held_out_fraction.
    part: all of that text, or its validation or test part, of half of the bytes each, as studies divide it.
    block_size: length of a row, for both; 0 for that of each run's training (of an imported run, the other's).
    checkpoint: best, latest, or a step, of both.
    output_dir: the report's folder; by default compared/RUN-vs-RUN.
    """

    runs: tuple[str, ...] = argument(annotation=str, positional=True, repeated=True)
    data: str = ""
    held_out: bool = argument(False, switch=True)
    part: Part = "all"
    block_size: int = 0
    checkpoint: str = "best"
    output_dir: str = argument("", metavar="FOLDER")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as it is found: its checkpoint is not loaded yet."""

    name: str
    folder: Path
    config: RunConfig
    checkpoint: Checkpoint
    tokenizer: Tokenizer

    @property
    def imported(self) -> bool:
        """Whether `swamla import` made it: nothing is known of its training."""
        return self.config.data.source == TOKEN_IDS and identity_of_run(self.folder) is None


def names_runs(words: Sequence[str], *, study: bool) -> bool:
    """Whether the words of `swamla compare` are runs, and not arms or a study's file.

    Two words are runs where both are folders of runs, or names under runs/; where both are patterns as well, a flag of
    a study (study) makes them arms. Raises `UsageError` for runs that are not two, and for a run beside what is none.
    """
    are = [_is_run(word) for word in words]
    patterns = [_is_pattern(word) for word in words]
    shipped = len(words) == 1 and words[0] in study_names()
    if not any(are) or shipped or (all(patterns) and (study or not all(are) or len(words) != 2)):
        return False
    if all(are) and len(words) == 2:
        return True
    run = words[are.index(True)]
    if len(words) == 1:
        raise UsageError(f"{run}: one run: {_TWO}")
    if all(are):
        raise UsageError(f"{len(words)} runs: {_TWO}")
    alone = [word for word, is_run, is_pattern in zip(words, are, patterns, strict=True) if is_run and not is_pattern]
    if not alone:  # names of runs that are patterns too, beside an arm of another kind
        return False
    other = words[are.index(False)]
    raise UsageError(f"{alone[0]} is a run, and {other} is none: {_TWO}; swamla runs lists runs")


def help_of_runs() -> str:
    """What the help of `swamla compare` says of two runs."""
    flags = " ".join(f"[--{field.name}]" for field in fields(Arguments) if field.name != "runs")
    return (
        f"Two finished runs: swamla compare RUN RUN {flags}. Two words are runs where both are folders of runs, or "
        "names under runs/; where both are patterns as well, any flag above that is not one of these makes them arms. "
        "swamla compare RUN RUN --help, of runs that are there, tells more."
    )


def _is_run(word: str) -> bool:
    return "\0" not in word and (run_folder(word) / "config.json").is_file()


def _is_pattern(word: str) -> bool:
    names = word.replace(",", " ").split()
    return bool(names) and all(name in BLOCK_PARTS["mixer"] for name in names)


def main(argv: list[str], of_arms: Sequence[str] = ()) -> int:
    """Measure, write the report, and print the verdict. of_arms: flags that only a comparison of arms has."""

    def refusal(name: str) -> str:
        return "it is for arms, and these are two runs" if name in of_arms else ""

    arguments, given = parse(Arguments, argv, command="swamla compare", more=own_flags(), refusal=refusal)
    scipy_stats()  # an error now, and not when all is scored
    if arguments.block_size < 0:
        raise UsageError(f"--block_size {arguments.block_size}: must be > 0, e.g. 256")
    if not arguments.data and (alone := sorted(given.keys() & {*own_flags(), "held_out"})):
        raise UsageError(f"--{alone[0]} needs --data; without it the first run's held-out text is read")
    folders = [run_folder(name) for name in arguments.runs]
    if folders[0].resolve() == folders[1].resolve():
        raise UsageError(f"{arguments.runs[0]} and {arguments.runs[1]} are the same run: {_TWO}")
    names = distinct_names(folders)
    names = names if names[0] != names[1] else [str(folder) for folder in folders]
    first, second = runs = [_found(*each, arguments) for each in zip(names, folders, strict=True)]
    named = checked(arguments.output_dir) if arguments.output_dir else None
    output = named or Path("compared") / f"{slug_of(first.name)}-vs-{slug_of(second.name)}"[:80]
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / COMPARED).exists())):
        raise UsageError(f"--output_dir {output}: exists and holds no such report: choose another folder")
    console = Console()
    if all(map(_is_pattern, arguments.runs)):
        say_wrapped(
            console, "these are names of runs; for arms of these patterns give --recipe, e.g. --recipe quickstart"
        )
    command = shlex.join(["swamla", "compare", *argv])
    with writable(output), shown_progress(Console(stderr=True)) as progress:

        def scoring(run: Run) -> Progress:
            return lambda share: progress(f"scoring, {run.name}", 0, 0, share)

        compare = _on_task if _kind(runs, arguments) == "task" else _on_text
        found = replace(compare(first, second, arguments, given, scoring), command=command)
        progress("comparing, drawing", 0, 0, None)
        written = write_report(found, output)
    _say(console, found)
    say_wrapped(console, f"all of it is in {output}: {', '.join(file.name for file in written)}")
    say(console, f"{output / REPORT}: open it in a browser")
    return 0


def _found(name: str, folder: Path, arguments: Arguments) -> Run:
    config = run_config(folder)  # says what it is if it is no run
    checkpoint = find_checkpoint(folder, arguments.checkpoint)
    return Run(
        name=name,
        folder=folder,
        config=config,
        checkpoint=checkpoint,
        tokenizer=load_tokenizer(folder / "tokenizer.json"),
    )


def _kind(runs: Sequence[Run], arguments: Arguments) -> str:
    """What the runs are compared on: "text" or "task". Raises `UsageError` where they have nothing in common."""
    sources = {run.name: run.config.data.source for run in runs}
    tasks = {name: source for name, source in sources.items() if source.startswith(PREFIX)}
    if len(tasks) == 1:
        (task, source), other = next(iter(tasks.items())), next(name for name in sources if name not in tasks)
        raise UsageError(
            f"{task} was trained on {source}, and {other} on text: compare takes two runs of text, or two of a task"
        )
    kind = "task" if tasks else "text"
    if arguments.data and arguments.data.startswith(PREFIX) != (kind == "task"):
        raise UsageError(f"--data {arguments.data}: both runs were trained on {'a task' if tasks else 'text'}")
    if arguments.data.startswith(CHAT):
        raise UsageError(f"--data {arguments.data}: runs are compared on text: give a file of texts")
    return kind


# ---- on text --------------------------------------------------------------------------------------------------------


def _on_text(
    first: Run, second: Run, arguments: Arguments, given: Mapping[str, Any], scoring: Callable[[Run], Progress]
) -> Compared:
    dataset = _dataset(first, arguments, given)
    tokenizer = dataset.tokenizer
    split = part_of(dataset.held_out, arguments.part, tokenizer.decode)
    if split.n_documents == 0:
        raise DataError("nothing to compare: the held-out split has no documents")
    apart = bytes_apart(split, tokenizer.decode)
    same = tokenizer.fingerprint == second.tokenizer.fingerprint
    if apart and not same:
        raise DataError(
            f"{first.name}: its tokenizer loses {apart:,} bytes of this text, which {second.name}'s would not be given"
        )
    try:
        other = split if same else encoded(texts_of(split, tokenizer), second.tokenizer, split)
    except DataError as error:
        raise DataError(f"{dataset.source}, for {second.name}: {error}") from error
    notes = []
    own = "" if arguments.data else dataset.fingerprint
    for run, tested in ((first, split), (second, other)):
        notes += _untrained(run, tested, dataset.source, own)
    if apart:
        notes.append(f"The tokenizer loses {apart:,} bytes of the text: bits per byte are too low, in both alike.")
    lengths = _lengths(first, second, arguments)
    losses, precisions = zip(
        *(
            _losses(run, tested, length, scoring(run))
            for run, tested, length in ((first, split, lengths[0]), (second, other, lengths[1]))
        ),
        strict=True,
    )
    splits = split, other
    nats = [one.of_documents(each) for one, each in zip(losses, splits, strict=True)]
    bits = tuple(each / _LN2 for each in nats)
    weights = split.byte_counts.astype(float)

    def text(number: int) -> str:
        return tokenizer.decode(split.document(number)[:400].tolist())

    sides = [
        _side(run, length, str(precision), in_bits=not same, best=arguments.checkpoint == "best")
        for run, length, precision in zip((first, second), lengths, precisions, strict=True)
    ]
    pair = losses[0].nats_N, losses[1].nats_N
    whole = "all" if arguments.data and not arguments.held_out else "the held-out part"
    return Compared(
        kind="text",
        first=sides[0],
        second=sides[1],
        source=dataset.source,
        part=whole if arguments.part == "all" else f"the {arguments.part} part of {whole}",
        score=paired(bits[0], bits[1], weights),
        amounts_N=bits,
        weights_N=split.byte_counts,
        loss=(float(pair[0].mean()), float(pair[1].mean())),
        labels=(len(pair[0]), len(pair[1])),
        documents=document_differences(bits[0], bits[1], split.byte_counts, text),
        shares=tuple(shares(bits[0], bits[1], weights)),
        positions=(losses[0].by_position(lengths[0]), losses[1].by_position(lengths[1])) if same else None,
        tokens=token_differences(*pair, split, tokenizer.decode) if same else None,
        kinds=kind_differences(*pair, split, tokenizer.decode) if same else None,
        curve_unit="loss, nats a token" if same else "bits per byte",
        apart=apart,
        notes=tuple(notes),
        version=__version__,
    )


def _dataset(first: Run, arguments: Arguments, given: Mapping[str, Any]) -> Dataset:
    """The documents, with the first run's tokenizer."""
    if arguments.data:
        return data_of_flag(arguments.data, first.folder, first.config, given, own_flags(), held_out=arguments.held_out)
    data = first.config.data
    if data.chat is not None:
        raise UsageError(f"{first.name}: was fine-tuned on conversations: give text to compare on by --data FILE")
    if first.imported:
        raise UsageError(
            f"{first.name}: was imported, and has no held-out text: name the other run first, or give text by --data"
        )
    return own_data(first.folder, first.config, first.checkpoint)


def _lengths(first: Run, second: Run, arguments: Arguments) -> list[int]:
    """The lengths of both runs' rows: those of training; an imported run, which has none, gets the other's."""
    own = [run.config.train.block_size for run in (first, second)]
    if first.imported != second.imported:
        own = [own[first.imported]] * 2
    return [arguments.block_size or length for length in own]


def _untrained(run: Run, tested: Split, source: str, own: str) -> list[str]:
    """Notes of what could not be found out; own: the fingerprint of the data whose held-out text is tested, or "".

    Raises `UsageError` for text that the run, or one whose weights it began with, was trained on.
    """
    data = run.config.data
    if own and str(run.checkpoint.state.get("data_fingerprint", "")) == own and not (run.folder / RECORD).is_file():
        return []  # its own split
    if run.imported:
        return [f"{run.name} was imported: whether it was trained on this text is not known."]
    found = list(trained_on(tested, run.tokenizer, source, data, run.folder, run.name))
    if sure := [each.told for each in found if each.sure]:
        raise UsageError(f"{sure[0]}: give text that neither run has seen by --data")
    return [f"{each.told}." for each in found]


def _losses(run: Run, split: Split, block_size: int, progress: Progress) -> tuple[Losses, str]:
    model, tokenizer = load(run.folder, str(run.checkpoint.step))
    precision = precision_of(run.config, run.checkpoint, model)
    with autocast(precision, model.device):
        found = text_losses(model, split, eos_id=tokenizer.eos_id, block_size=block_size, progress=progress)
    return found, precision


# ---- on a task ------------------------------------------------------------------------------------------------------


def _on_task(
    first: Run, second: Run, arguments: Arguments, given: Mapping[str, Any], scoring: Callable[[Run], Progress]
) -> Compared:
    if others := sorted(given.keys() & {*own_flags(), "held_out", "block_size", "part"}):
        raise UsageError(f"--{others[0]} is for texts; of a task the test rows are read")
    task = parse_task(arguments.data or first.config.data.source)
    dataset = TaskDataset(task)
    for run in (first, second):
        if run.tokenizer.fingerprint != dataset.tokenizer.fingerprint:
            raise UsageError(
                f"{run.name}: was trained on {run.config.data.source}, whose ids are others than those of "
                f"{dataset.source}: compare takes two runs of the same task"
            )
    rows = list(dataset.held_out_rows(max(1, EVALUATION_TOKENS // task.length), test=True))
    scored, precisions = zip(*(_answers(run, rows, scoring(run)) for run in (first, second)), strict=True)
    asked, right = scored[0].asked_N, tuple(one.right_N for one in scored)
    tokens = [row for batch in rows for row in batch.tokens_BT]

    def text(number: int) -> str:
        return dataset.tokenizer.decode(tokens[number].tolist())

    sides = [
        _side(run, task.length, str(precision), in_bits=False, best=False)  # chosen by other rows than these
        for run, precision in zip((first, second), precisions, strict=True)
    ]
    notes = [
        f"{run.name} was trained on {run.config.data.source}, and is asked {dataset.source}."
        for run in (first, second)
        if run.config.data.source != dataset.source
    ]
    return Compared(
        kind="task",
        first=sides[0],
        second=sides[1],
        source=dataset.source,
        part=f"{len(asked):,} test rows",
        score=paired(right[0], right[1], asked),
        amounts_N=right,
        weights_N=asked,
        loss=tuple(float(one.nats_N.sum() / asked.sum()) for one in scored),  # type: ignore[arg-type]
        labels=(int(asked.sum()), int(asked.sum())),
        documents=document_differences(scored[0].nats_N, scored[1].nats_N, asked, text),
        shares=tuple(shares(right[0], right[1], asked)),
        curve_unit="loss, nats an answer",
        notes=tuple(notes),
        version=__version__,
    )


def _answers(run: Run, rows: Sequence[Any], progress: Progress) -> tuple[Answers, str]:
    model, _ = load(run.folder, str(run.checkpoint.step))
    precision = precision_of(run.config, run.checkpoint, model)

    def told() -> Any:
        for number, batch in enumerate(rows):
            progress(number / len(rows))
            yield batch

    with autocast(precision, model.device):
        return answers(model, told()), precision


# ---- both -----------------------------------------------------------------------------------------------------------


def _side(run: Run, length: int, precision: str, *, in_bits: bool, best: bool) -> Side:
    config, state = run.config, run.checkpoint.state
    metrics = run.folder / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.is_file() else []
    began = run.folder / RECORD
    data = " + ".join(part.source for part in config.data.sources)
    return Side(
        name=run.name,
        folder=str(run.folder),
        step=run.checkpoint.step,
        last=step_of(list_checkpoints(run.folder / "checkpoints")[-1]) if best else None,
        config=config,
        costs=Costs.of(_with_vocabulary(config, run.tokenizer).model, length),
        tokens=int(state["tokens"]) if "tokens" in state else None,
        precision=precision,
        block_size=length,
        data="unknown" if run.imported else data,
        data_id=str(state.get("data_fingerprint", "")),
        tokenizer="as imported" if run.imported else config.data.tokenizer,
        tokenizer_id=run.tokenizer.fingerprint,
        vocabulary=run.tokenizer.vocab_size,
        imported=run.imported,
        began=describe(read_json(began, inside=run.folder)) if began.is_file() else "",
        curve=read_curve(run.name, records, x="tokens", y="bits_per_byte" if in_bits else "loss"),
    )


def _with_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    if config.model.vocab_size:
        return config
    return replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size))


def _say(console: Console, found: Compared) -> None:
    """The table, settings that differ, the verdict, and what it does not say."""
    heads, rows = found.table()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for number, head in enumerate(heads):
        table.add_column(Text(head), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    differing = told_settings(found.configs, found.differing)
    if differing:
        say(console, "settings that differ:")
    for setting, values in list(differing.items())[:_SHOWN]:
        say_wrapped(console, f"{setting}: {' → '.join(map(_value, values.values()))}", label="- ", indent=2)
    if len(differing) > _SHOWN:
        say(console, f"- and {len(differing) - _SHOWN} more, in {COMPARED}")
    for text in found.verdict():
        say_wrapped(console, text)
    say(console, "what this does not say:")
    for text in found.not_said():
        say_wrapped(console, text, label="- ", indent=2)


def _value(value: Any) -> str:
    return "–" if value is None else setting_words(value)
