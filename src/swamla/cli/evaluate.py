"""`swamla evaluate RUN [--data …]`: the loss of a trained model on its run's held-out text, or on other text.

With --tasks: `evaluate_tasks.py`.
"""

import hashlib
import json
import warnings
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from swamla.checkpoint import Checkpoint, find_checkpoint, load, read_run_config
from swamla.cli.console import Console, say, say_wrapped
from swamla.cli.evaluate_tasks import evaluate_tasks
from swamla.cli.flags import Flag, argument, parse
from swamla.cli.overrides import apply_flags, data_flags
from swamla.cli.running import data_of_run, read_data, run_folder
from swamla.config import from_plain
from swamla.data.config import DataConfig
from swamla.data.dataset import Dataset
from swamla.data.reopening import reopen
from swamla.data.shards import Split
from swamla.data.task_rows import HELD_OUT_ROWS, TaskDataset
from swamla.data.tokenizer import Tokenizer, load_tokenizer
from swamla.errors import DataError, SwamlaError, UsageError
from swamla.evaluate import bytes_apart, part_of, validation
from swamla.model.language_model import LanguageModel
from swamla.tasks import PREFIX
from swamla.tasks import parse as parse_task
from swamla.train import RunConfig
from swamla.train.changes import config_of
from swamla.train.init_from import lineage
from swamla.train.precision import Chosen, autocast, resolve_as_trained
from swamla.train.run_folder import identity_of_run

# Fields of `DataConfig` that are flags for --data; --split is short for --hub_split.
_OWN = ("text_column", "hub_config", "split", "hub_revision", "invalid_utf8", "on_bad_row", "cache_dir")


# To find a training document that is the beginning of a tested one: the largest number of documents that are searched,
# the number of first tokens by which they are found, and of last tokens, before the cut, that may differ.
_FEW, _ALIKE, _AT_THE_CUT = 10_000, 16, 16


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Loss, perplexity and bits per byte of a trained model on held-out text, or its scores in tasks of lm-eval.

    A model that was trained on a synthetic task is scored on held-out rows of it: loss and accuracy.

    run: the run's folder.
    data: score all of this data, with the run's tokenizer, instead of the run's held-out text; or other rows of a task:
        "task:mqar?pairs=16".
    held_out: score only the part of --data that a run on it would hold out, by the run's held_out_fraction.
    part: all of that text, or its validation or test part, of half of the bytes each, as studies divide it.
    block_size: length of a row; 0 for the run's.
    checkpoint: best, latest, or a step.
    json: print one JSON object.
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
    part: Literal["all", "validation", "test"] = "all"
    block_size: int = 0
    checkpoint: str = "best"
    json: bool = False
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
    arguments, given = parse(Arguments, argv, command="swamla evaluate", more=_own_flags())
    if arguments.block_size < 0:
        raise UsageError(f"--block_size {arguments.block_size}: must be > 0, e.g. 256")
    if not arguments.data and (alone := sorted(given.keys() & {*_OWN, "held_out"})):
        raise UsageError(f"--{alone[0]} needs --data; without it the run's own held-out text is scored")
    if not arguments.tasks and (alone := sorted(given.keys() & set(_OF_TASKS))):
        raise UsageError(f"--{alone[0]} needs --tasks, e.g. --tasks hellaswag")
    if arguments.tasks:
        if others := sorted(given.keys() & {*_OWN, "data", "held_out", "part", "block_size"}):
            raise UsageError(f"--{others[0]} and --tasks exclude each other: tasks bring their own texts")
        settings = {name: getattr(arguments, name) for name in _OF_TASKS}
        evaluate_tasks(arguments.run, arguments.checkpoint, arguments.tasks, as_json=arguments.json, **settings)
        return 0
    run = run_folder(arguments.run)
    plain = read_run_config(run)
    plain.pop("format_version", None)
    config = from_plain(RunConfig, plain, origin=str(run / "config.json"))
    checkpoint = find_checkpoint(run, arguments.checkpoint)
    model, _ = load(run, str(checkpoint.step))
    trained = str(checkpoint.state.get("precision", ""))
    precision = resolve_as_trained(config.train.precision, trained, model.device)
    scored = arguments.data or config.data.source
    if scored.startswith(PREFIX):
        task = parse_task(scored)
        if others := sorted(given.keys() & {*_OWN, "held_out", "block_size"}):
            raise UsageError(f"--{others[0]} is for texts; a task has its sizes in its name: --data '{PREFIX}{task}'")
        _score_task(TaskDataset(task), model, load_tokenizer(run / "tokenizer.json"), precision, arguments)
        return 0
    dataset = _other_data(arguments, given, run, config) if arguments.data else _own_data(run, config, checkpoint)
    score = validation(dataset, arguments.block_size or config.train.block_size, part=arguments.part)
    text = part_of(dataset.held_out, arguments.part, dataset.tokenizer.decode)
    if not arguments.json:
        tokens = text.n_tokens + text.n_documents
        say(Console(stderr=True), f"scoring {tokens:,} tokens, {text.n_bytes:,} bytes of text …")
    with autocast(precision, model.device):
        found = score(model)
    part = "all" if arguments.data and not arguments.held_out else "the held-out part"
    part = part if arguments.part == "all" else f"the {arguments.part} part of {part}"
    source = arguments.data or config.data.source
    apart = bytes_apart(text, dataset.tokenizer.decode)
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
    if arguments.json:
        print(json.dumps(found | {"precision": precision, "source": dataset.source, "scored": rows}))
        return
    print(f"loss          {found['loss']:.4f} nats per label")
    print(f"accuracy      {found['accuracy']:.4f}", flush=True)
    scored = f"over {found['tokens']:,} labels in {HELD_OUT_ROWS:,} {rows} of {dataset.source}, in {precision}"
    say_wrapped(Console(), scored)


def _own_flags() -> dict[str, Flag]:
    flags = data_flags()
    flags["split"] = replace(flags["hub_split"], name="split")
    return {name: flags[name] for name in _OWN}


def _own_data(run: Path, config: RunConfig, checkpoint: Checkpoint) -> Dataset:
    """The run's own data; warns if it has changed since training."""
    dataset = data_of_run(run, config.data, Console(stderr=True))
    assert isinstance(dataset, Dataset)  # no task, which is scored without it
    trained_on = checkpoint.state["data_fingerprint"]
    if dataset.fingerprint != trained_on:
        warnings.warn(
            f"{config.data.source} has changed since training (fingerprint {dataset.fingerprint[:12]}, then "
            f"{trained_on[:12]}): the text scored now may have been trained on",
            stacklevel=2,
        )
    return dataset


def _other_data(arguments: Arguments, given: Mapping[str, Any], run: Path, config: RunConfig) -> Dataset:
    """The dataset of --data, encoded with the run's tokenizer; warns of documents that the model was trained on."""
    fraction = config.data.held_out_fraction if arguments.held_out else 1.0
    data = {"source": arguments.data, "tokenizer": str(run / "tokenizer.json"), "held_out_fraction": fraction}
    plain = {"data": data | {"cache_dir": config.data.cache_dir}}
    flags = apply_flags(plain, given, _own_flags())
    chosen = from_plain(DataConfig, plain["data"], path="data", origin=lambda field: flags.get(field, "--data"))
    dataset = read_data(chosen, Console(stderr=True))
    _warn_of_trained_text(dataset, config.data, run, "the run")
    for other in islice(lineage(run), 1, None):
        who = f"{other}, whose weights the run began with,"
        try:
            _warn_of_trained_text(dataset, config_of(other).data, other, who)
        except SwamlaError as error:  # damaged, or no longer there
            warnings.warn(f"cannot tell what {who} was trained on: {error}", stacklevel=2)
    return dataset


def _warn_of_trained_text(dataset: Dataset, trained_on: DataConfig, run: Path, who: str) -> None:
    """Warn of documents that `run` was trained on, found by their tokens, or by the source's name without these."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # changed raw files do not matter here
        known = identity_of_run(run)
        own = None if known is None else reopen(trained_on, known)
    source, total = dataset.source, dataset.held_out.n_documents
    if own is not None and (shared := _documents_shared(dataset.held_out, own.train, dataset.tokenizer)):
        only = " (only a sample of its streamed data was compared)" if trained_on.stream else ""
        message = f"{source}: {who} was trained on {shared} of these {total} documents{only}"
        warnings.warn(message, stacklevel=3)
    elif own is not None and _begins_as_trained(dataset.held_out, own.train):
        warnings.warn(f"{source}: {who} was trained on the beginning of one of its documents", stacklevel=3)
    elif own is None and source in {trained_on.source, *(part.source for part in trained_on.mixture)}:
        warnings.warn(f"{source}: {who} was trained on it", stacklevel=3)


def _documents_shared(tested: Split, trained: Split, tokenizer: Tokenizer) -> int:
    """How many documents of `tested` are also in `trained`, ignoring line ends; both are encoded with `tokenizer`."""
    wanted = [_with_other_line_ends(tested.document(index), tokenizer) for index in range(tested.n_documents)]
    lengths = sorted({len(ids) for alike in wanted for ids in alike})
    possible = np.flatnonzero(np.isin(trained.lengths, lengths))  # others need not be read
    known = {_digest(trained.document(int(index))) for index in possible}
    return sum(any(_digest(ids) in known for ids in alike) for alike in wanted)


def _with_other_line_ends(ids: np.ndarray, tokenizer: Tokenizer) -> list[np.ndarray]:
    """The ids of a document and, if it has several lines, of its text with \\n and with \\r\\n line ends."""
    text = tokenizer.decode(ids.tolist())
    unix = text.replace("\r\n", "\n").replace("\r", "\n")
    others = {unix, unix.replace("\n", "\r\n")} - {text} if "\n" in unix else set()
    found = [ids]
    for other in sorted(others):
        with suppress(DataError):  # a character vocabulary may lack this line end
            found.append(np.array(tokenizer.encode(other)))
    return found


def _digest(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(ids.astype(np.uint32).tobytes(), digest_size=16).digest()


def _begins_as_trained(tested: Split, trained: Split) -> bool:
    """Whether a training document is the beginning of a tested one: the only document of a source is cut in two.

    The last few tokens before the cut may differ from those of the whole.
    """
    if trained.n_documents > _FEW:  # then no document was cut
        return False
    begun: dict[bytes, list[int]] = defaultdict(list)
    for index in np.flatnonzero(trained.lengths >= _ALIKE + _AT_THE_CUT):
        begun[trained.document(int(index))[:_ALIKE].tobytes()].append(int(index))
    for whole in map(tested.document, range(tested.n_documents)):
        for number in begun[whole[:_ALIKE].tobytes()]:
            start = trained.document(number)[:-_AT_THE_CUT]
            if 2 * len(start) > len(whole) > len(start) and np.array_equal(whole[: len(start)], start):
                return True
    return False
