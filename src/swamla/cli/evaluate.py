"""`swamla evaluate RUN [--data …]`: how well a model predicts held-out text."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from swamla.checkpoint import load, read_run_config
from swamla.cli.flags import Positional, parse
from swamla.cli.running import validation
from swamla.config import from_plain
from swamla.data.preparing import prepare
from swamla.errors import UsageError
from swamla.train import RunConfig
from swamla.train.precision import autocast, resolve_precision


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
    model, _ = load(run, arguments.checkpoint)
    data = config.data
    if arguments.data:
        data = replace(data, source=arguments.data, tokenizer=str(run / "tokenizer.json"))
    score = validation(prepare(data), arguments.block_size or config.train.block_size)
    with autocast(resolve_precision(config.train.precision, model.device), model.device):
        found = score(model)
    if arguments.json:
        print(json.dumps(found))
    else:
        print(f"loss          {found['loss']:.4f} nats per token")
        print(f"perplexity    {found['perplexity']:.2f}")
        print(f"bits per byte {found['bits_per_byte']:.4f}")
        print(f"over {found['tokens']:,} tokens, {found['bytes']:,.0f} bytes of {data.source}")
    return 0
