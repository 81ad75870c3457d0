"""`swamla evaluate RUN [--data …]`: how well a model predicts held-out text."""

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from swamla.checkpoint import find_checkpoint, load, read_run_config
from swamla.cli.console import Console
from swamla.cli.flags import Positional, parse
from swamla.cli.running import read_data, validation
from swamla.config import from_plain
from swamla.errors import UsageError
from swamla.evaluate import bytes_apart
from swamla.train import RunConfig
from swamla.train.precision import autocast, resolve_precision, without_fp8


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Held-out loss, perplexity and bits per byte of a trained model."""

    run: Positional[str]
    """The run's folder."""
    data: str = ""
    """Other data than the run's own: its held-out part is scored, with the run's tokenizer."""
    block_size: int = 0
    """Tokens the model reads at a time (0: as in training)."""
    checkpoint: str = "best"
    """best, latest, or a step."""
    json: bool = False
    """Print one JSON object."""


def main(argv: list[str]) -> int:
    """Evaluate and print."""
    arguments, _ = parse(Arguments, argv, command="evaluate")
    if arguments.block_size < 0:
        raise UsageError(f"--block_size {arguments.block_size}: must be > 0, e.g. 256")
    run = Path(arguments.run)
    plain = read_run_config(run)
    plain.pop("format_version", None)
    config = from_plain(RunConfig, plain, origin=str(run / "config.json"))
    checkpoint = find_checkpoint(run, arguments.checkpoint)
    model, _ = load(run, str(checkpoint.step))
    # The run's own tokenizer, never one made again: today's source might give another.
    data = replace(config.data, source=arguments.data or config.data.source, tokenizer=str(run / "tokenizer.json"))
    dataset = read_data(data, Console(stderr=True))
    trained_on = checkpoint.state["data_fingerprint"]
    if not arguments.data and dataset.fingerprint != trained_on:
        warnings.warn(
            f"{data.source} is not what the run was trained on (fingerprint {dataset.fingerprint[:12]}, then "
            f"{trained_on[:12]}): what is scored now may have been trained on",
            stacklevel=2,
        )
    score = validation(dataset, arguments.block_size or config.train.block_size)
    precision = without_fp8(resolve_precision(config.train.precision, model.device))
    with autocast(precision, model.device):
        found = score(model)
    apart = bytes_apart(dataset.held_out, dataset.tokenizer.decode)
    if arguments.json:
        print(json.dumps(found | {"precision": precision, "bytes_apart": apart}))
    else:
        print(f"loss          {found['loss']:.4f} nats per token")
        print(f"perplexity    {found['perplexity']:.2f}")
        print(f"bits per byte {found['bits_per_byte']:.4f}")
        print(f"over {found['tokens']:,} tokens, {found['bytes']:,.0f} bytes of {data.source}, in {precision}")
        print(f"bytes counted less those that the tokens decode to: {apart:,}")
    return 0
