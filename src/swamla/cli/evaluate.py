"""`swamla evaluate RUN [--data …]`: the loss of a trained model on its run's held-out text, or on other text.

With --tasks: `evaluate_tasks.py`.
"""

import json
from dataclasses import dataclass, replace

from swamla.checkpoint import find_checkpoint, load
from swamla.checkpoint.run import weights_of
from swamla.cli.console import Console, say, say_wrapped
from swamla.cli.evaluate_tasks import evaluate_tasks
from swamla.cli.flags import Flag, argument, parse
from swamla.cli.overrides import data_flags
from swamla.cli.roundings import show_roundings
from swamla.cli.running import run_folder
from swamla.cli.scoring import Part, Scoring, other_data, own_data, precision_of, run_config
from swamla.data.chat_rows import ChatDataset
from swamla.data.config import CHAT, DataConfig
from swamla.data.dataset import TrainingData
from swamla.data.task_rows import HELD_OUT_ROWS, TaskDataset
from swamla.data.tokenizer import Tokenizer, load_tokenizer
from swamla.errors import UsageError
from swamla.evaluate import bytes_apart, validation
from swamla.model.language_model import LanguageModel
from swamla.tasks import PREFIX
from swamla.tasks import parse as parse_task
from swamla.train.precision import Chosen, autocast

# Fields of `DataConfig` that are flags for --data; --split is short for --hub_split.
_OWN = ("text_column", "hub_config", "split", "hub_revision", "invalid_utf8", "on_bad_row", "cache_dir")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Loss, perplexity and bits per byte of a trained model on held-out text, or its scores in tasks of lm-eval.

    A model that was trained on a synthetic task is scored on held-out rows of it, and one that was fine-tuned on
    conversations on held-out answers: loss and accuracy.

    run: the run's folder.
    data: score all of this data, with the run's tokenizer, instead of the run's held-out text; or other rows of a task:
        "task:mqar?pairs=16"; or other conversations: "chat:FILE".
    held_out: score only the part of --data that a run on it would hold out, by the run's held_out_fraction.
    part: all of that text, or its validation or test part, of half of the bytes each, as studies divide it.
    block_size: length of a row; 0 for the run's.
    checkpoint: best, latest, or a step.
    json: print one JSON object.
    quantize: a table of size, bits per byte and decoding speed with these roundings of the weights beside the weights
        themselves, e.g. int8,int4; nothing is written.
    tasks: run these tasks of lm-eval instead, by name or pattern, e.g. hellaswag,arc_*; "list" shows the tasks.
    num_fewshot: examples before each question, by default the task's own number.
    limit: only this many documents of each task; 0 for all.
    batch_size: rows of a forward pass of --tasks.
    include_path: a folder of task files (YAML) of your own.
    out: write the results of --tasks to this file, as JSON.
    samples: write every document and answer, too.
    """

    run: str = argument(positional=True)
    data: str = ""
    held_out: bool = argument(False, switch=True)
    part: Part = "all"
    block_size: int = 0
    checkpoint: str = "best"
    json: bool = False
    quantize: str = argument("", metavar="FORMAT,…")
    tasks: str = argument("", group="tasks")
    num_fewshot: int | None = argument(None, group="tasks")
    limit: int = argument(0, group="tasks")
    batch_size: int = argument(8, group="tasks")
    include_path: str = argument("", group="tasks")
    out: str = argument("", group="tasks")
    samples: bool = argument(False, group="tasks", switch=True)


_OF_TASKS = ("num_fewshot", "limit", "batch_size", "include_path", "out", "samples")


def main(argv: list[str]) -> int:
    """Evaluate and print."""
    arguments, given = parse(Arguments, argv, command="swamla evaluate", more=own_flags())
    if arguments.block_size < 0:
        raise UsageError(f"--block_size {arguments.block_size}: must be > 0, e.g. 256")
    if not arguments.data and (alone := sorted(given.keys() & {*_OWN, "held_out"})):
        raise UsageError(f"--{alone[0]} needs --data; without it the run's own held-out text is scored")
    if not arguments.tasks and (alone := sorted(given.keys() & set(_OF_TASKS))):
        raise UsageError(f"--{alone[0]} needs --tasks, e.g. --tasks hellaswag")
    if arguments.tasks:
        if others := sorted(given.keys() & {*_OWN, "data", "held_out", "part", "block_size", "quantize"}):
            raise UsageError(f"--{others[0]} and --tasks exclude each other: tasks bring their own texts")
        settings = {name: getattr(arguments, name) for name in _OF_TASKS}
        evaluate_tasks(arguments.run, arguments.checkpoint, arguments.tasks, as_json=arguments.json, **settings)
        return 0
    run = run_folder(arguments.run)
    config = run_config(run)  # says what it is if it is no run
    checkpoint = find_checkpoint(run, arguments.checkpoint)
    model, _ = load(run, str(checkpoint.step))
    scored = arguments.data or config.data.source
    if scored.startswith(PREFIX):
        task = parse_task(scored)
        if others := sorted(given.keys() & {*_OWN, "held_out", "block_size", "quantize"}):
            raise UsageError(f"--{others[0]} is for texts; a task has its sizes in its name: --data '{PREFIX}{task}'")
        precision = precision_of(config, checkpoint, model)
        _score_task(TaskDataset(task), model, load_tokenizer(run / "tokenizer.json"), precision, arguments)
        return 0
    if scored.startswith(CHAT):
        if others := sorted(given.keys() & {*_OWN, "held_out", "quantize"}):
            raise UsageError(f"--{others[0]} is for texts; of conversations the held-out answers are scored")
        own = config.data if config.data.chat is not None else DataConfig(source=scored, tokenizer="byte")
        chats = ChatDataset(replace(own, source=scored), tokenizer=str(run / "tokenizer.json"))
        length, precision = arguments.block_size or config.train.block_size, precision_of(config, checkpoint, model)
        with autocast(precision, model.device):
            found = validation(chats, length, part=arguments.part)(model)
        _print_answers(found, chats, f"{len(chats.held_out):,} held-out conversations", precision, arguments)
        return 0
    if arguments.data:
        dataset = other_data(arguments.data, run, config, given, own_flags(), held_out=arguments.held_out)
    else:
        dataset = own_data(run, config, checkpoint)
    scoring = Scoring.of(dataset, config, checkpoint, model, arguments.block_size, arguments.part)
    if arguments.quantize:
        formats = [name for name in arguments.quantize.split(",") if name]
        show_roundings(
            model,
            weights_of(checkpoint),
            formats,
            scoring.bits_per_byte,
            precision=scoring.precision,
            as_json=arguments.json,
        )
        return 0
    if not arguments.json:
        scoring.announce()
    found, precision = scoring.score(model), scoring.precision
    part = "all" if arguments.data and not arguments.held_out else "the held-out part"
    part = part if arguments.part == "all" else f"the {arguments.part} part of {part}"
    source = arguments.data or config.data.source
    apart = bytes_apart(scoring.text, dataset.tokenizer.decode)
    if arguments.json:
        print(json.dumps(found | {"precision": precision, "source": source, "scored": part, "bytes_apart": apart}))
    else:
        print(f"loss          {found['loss']:.4f} nats per token")
        print(f"perplexity    {found['perplexity']:.2f}")
        print(f"bits per byte {found['bits_per_byte']:.4f}", flush=True)
        console = Console()
        scored = f"over {found['tokens']:,} tokens, {found['bytes']:,.0f} bytes: {part} of {source}, in {precision}"
        say_wrapped(console, scored)
        say(console, f"bytes counted minus bytes of the decoded tokens: {apart:,}")
    return 0


def _score_task(
    dataset: TaskDataset, model: LanguageModel, tokenizer: Tokenizer, precision: Chosen, arguments: Arguments
) -> None:
    """Print loss and accuracy on held-out rows of a task. Raises `UsageError` if its ids are not those of the run."""
    if dataset.tokenizer.fingerprint != tokenizer.fingerprint:
        other = f"its {dataset.task.vocab_size} ids are others than those that the run was trained on"
        raise UsageError(f"{dataset.source}: {other}: give it the run's kind and vocabulary")
    with autocast(precision, model.device):
        found = validation(dataset, dataset.task.length, part=arguments.part)(model)
    rows = "test rows" if arguments.part == "test" else "held-out rows"
    _print_answers(found, dataset, f"{HELD_OUT_ROWS:,} {rows}", precision, arguments)


def _print_answers(
    found: dict[str, float], dataset: TrainingData, rows: str, precision: Chosen, arguments: Arguments
) -> None:
    if arguments.json:
        scored = rows.lstrip("0123456789, ")
        print(json.dumps(found | {"precision": precision, "source": dataset.source, "scored": scored}))
        return
    print(f"loss          {found['loss']:.4f} nats per label")
    print(f"accuracy      {found['accuracy']:.4f}", flush=True)
    scored = f"over {found['tokens']:,} labels in {rows} of {dataset.source}, in {precision}"
    say_wrapped(Console(), scored)


def own_flags() -> dict[str, Flag]:
    """The flags of --data, which tell of a source what a run's config would."""
    flags = data_flags()
    flags["split"] = replace(flags["hub_split"], name="split")
    return {name: flags[name] for name in _OWN}
