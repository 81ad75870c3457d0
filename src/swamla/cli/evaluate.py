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
from swamla.cli.scoring import Part, Scoring, run_config, scored_data
from swamla.data.dataset import Dataset
from swamla.errors import UsageError
from swamla.evaluate import bytes_apart
from swamla.model.language_model import LanguageModel

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
    quantize: a table of size, bits per byte (of answers: nats per label) and decoding speed with these roundings of the
        weights beside the weights themselves, e.g. int8,int4; nothing is written.
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
    dataset = scored_data(arguments.data, run, config, checkpoint, given, own_flags(), held_out=arguments.held_out)
    scoring = Scoring.of(dataset, config, checkpoint, model, arguments.block_size, arguments.part)
    if arguments.quantize:
        formats = [name for name in arguments.quantize.split(",") if name]
        show_roundings(model, weights_of(checkpoint), formats, scoring, as_json=arguments.json)
    elif isinstance(dataset, Dataset):
        _print_text(scoring, model, arguments.data or config.data.source, arguments)
    else:
        _print_answers(scoring, model, as_json=arguments.json)
    return 0


def _print_text(scoring: Scoring, model: LanguageModel, source: str, arguments: Arguments) -> None:
    if not arguments.json:
        scoring.announce()
    found, precision = scoring.score(model), scoring.precision
    part = "all" if arguments.data and not arguments.held_out else "the held-out part"
    part = part if arguments.part == "all" else f"the {arguments.part} part of {part}"
    apart = bytes_apart(scoring.text, scoring.dataset.tokenizer.decode)
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


def _print_answers(scoring: Scoring, model: LanguageModel, *, as_json: bool) -> None:
    found, precision, source = scoring.score(model), scoring.precision, scoring.dataset.source
    if as_json:
        scored = scoring.rows.lstrip("0123456789, ")
        print(json.dumps(found | {"precision": precision, "source": source, "scored": scored}))
        return
    print(f"loss          {found['loss']:.4f} nats per label")
    print(f"accuracy      {found['accuracy']:.4f}", flush=True)
    say_wrapped(Console(), f"over {found['tokens']:,} labels in {scoring.rows} of {source}, in {precision}")


def own_flags() -> dict[str, Flag]:
    """The flags of --data, which tell of a source what a run's config would."""
    flags = data_flags()
    flags["split"] = replace(flags["hub_split"], name="split")
    return {name: flags[name] for name in _OWN}
