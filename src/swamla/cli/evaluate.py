"""`swamla evaluate RUN [--data …]`: how well a model predicts text: its run's held-out text, or all of another."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swamla.checkpoint import Checkpoint, find_checkpoint, load, read_run_config
from swamla.cli.console import Console
from swamla.cli.flags import Flag, argument, parse
from swamla.cli.overrides import data_flags, put_flags
from swamla.cli.running import data_of_run, read_data, validation
from swamla.config import from_plain
from swamla.data.config import DataConfig
from swamla.data.dataset import Dataset
from swamla.data.reopening import reopen
from swamla.data.shards import documents_shared
from swamla.errors import UsageError
from swamla.evaluate import bytes_apart
from swamla.train import RunConfig
from swamla.train.precision import autocast, resolve_as_trained
from swamla.train.run_folder import identity_of_run

# What a source of one's own is told of, by the names of its fields; --split is short for --hub_split.
_OWN = ("text_column", "hub_config", "split", "hub_revision", "invalid_utf8", "on_bad_row", "cache_dir")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Loss, perplexity and bits per byte of a trained model on text that it was not trained on.

    run: the run's folder.
    data: other data than the run's own held-out text: all of it is scored. Of the run only the tokenizer matters then.
    held_out: of --data score what a run on it would hold out alone, with the run's held_out_fraction.
    block_size: tokens the model reads at a time; 0 for as many as in training.
    checkpoint: best, latest, or a step.
    json: print one JSON object.
    """

    run: str = argument(positional=True)
    data: str = ""
    held_out: bool = argument(False, switch=True)
    block_size: int = 0
    checkpoint: str = "best"
    json: bool = False


def main(argv: list[str]) -> int:
    """Evaluate and print."""
    arguments, given = parse(Arguments, argv, command="swamla evaluate", more=_own_flags())
    if arguments.block_size < 0:
        raise UsageError(f"--block_size {arguments.block_size}: must be > 0, e.g. 256")
    if not arguments.data and (alone := sorted(given.keys() & {*_OWN, "held_out"})):
        raise UsageError(f"--{alone[0]} is of --data: give that too; without it the run's own held-out text is scored")
    run = Path(arguments.run)
    plain = read_run_config(run)
    plain.pop("format_version", None)
    config = from_plain(RunConfig, plain, origin=str(run / "config.json"))
    checkpoint = find_checkpoint(run, arguments.checkpoint)
    model, _ = load(run, str(checkpoint.step))
    dataset = _other_data(arguments, given, run, config) if arguments.data else _own_data(run, config, checkpoint)
    score = validation(dataset, arguments.block_size or config.train.block_size)
    trained = str(checkpoint.state.get("precision", ""))
    precision = resolve_as_trained(config.train.precision, trained, model.device)
    with autocast(precision, model.device):
        found = score(model)
    part = "all" if arguments.data and not arguments.held_out else "the held-out part"
    source = arguments.data or config.data.source
    apart = bytes_apart(dataset.held_out, dataset.tokenizer.decode)
    if arguments.json:
        print(json.dumps(found | {"precision": precision, "source": source, "scored": part, "bytes_apart": apart}))
    else:
        print(f"loss          {found['loss']:.4f} nats per token")
        print(f"perplexity    {found['perplexity']:.2f}")
        print(f"bits per byte {found['bits_per_byte']:.4f}")
        print(f"over {found['tokens']:,} tokens, {found['bytes']:,.0f} bytes: {part} of {source}, in {precision}")
        print(f"bytes counted less those that the tokens decode to: {apart:,}")
    return 0


def _own_flags() -> dict[str, Flag]:
    flags = data_flags()
    flags["split"] = replace(flags["hub_split"], name="split")
    return {name: flags[name] for name in _OWN}


def _own_data(run: Path, config: RunConfig, checkpoint: Checkpoint) -> Dataset:
    """What the run was trained on and held out, with a warning where that is something else by now."""
    dataset = data_of_run(run, config.data, Console(stderr=True))
    trained_on = checkpoint.state["data_fingerprint"]
    if dataset.fingerprint != trained_on:
        warnings.warn(
            f"{config.data.source} is not what the run was trained on (fingerprint {dataset.fingerprint[:12]}, then "
            f"{trained_on[:12]}): what is scored now may have been trained on",
            stacklevel=2,
        )
    return dataset


def _other_data(arguments: Arguments, given: Mapping[str, Any], run: Path, config: RunConfig) -> Dataset:
    """Another source, with flags of its own and the run's tokenizer: all of it, or what a run on it would hold out."""
    fraction = config.data.held_out_fraction if arguments.held_out else 1.0
    data = {"source": arguments.data, "tokenizer": str(run / "tokenizer.json"), "held_out_fraction": fraction}
    plain = {"data": data | {"cache_dir": config.data.cache_dir}}
    flags = put_flags(plain, given, _own_flags())
    chosen = from_plain(DataConfig, plain["data"], path="data", origin=lambda field: flags.get(field, "--data"))
    dataset = read_data(chosen, Console(stderr=True))
    _warn_of_trained_text(dataset, run, config)
    return dataset


def _warn_of_trained_text(dataset: Dataset, run: Path, config: RunConfig) -> None:
    """Warn of documents that the run was trained on, told by their tokens; of its sources, where those are no more."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what became of its raw files matters nothing here
        known = identity_of_run(run)
        own = None if known is None else reopen(config.data, known)
    source, total = dataset.source, dataset.held_out.n_documents
    if own is not None and (shared := documents_shared(dataset.held_out, own.train)):
        told = f"{source}: {shared} of its {total} documents are among those the run was trained on"
        warnings.warn(told, stacklevel=3)
    elif own is None and source in {config.data.source, *(part.source for part in config.data.mixture)}:
        warnings.warn(f"{source} is what the run was trained on", stacklevel=3)
