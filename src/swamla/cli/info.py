"""`swamla info RECIPE`: what a model costs, exactly, before a weight exists."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from swamla.cli.console import Console
from swamla.cli.flags import Positional, parse
from swamla.cli.overrides import add_flags
from swamla.cli.run_config import read_recipe
from swamla.data.config import parse_bpe
from swamla.errors import UsageError
from swamla.model.accounting import count_parameters, state_bytes, training_flops_per_token
from swamla.model.config import LanguageModelConfig

LENGTHS = (256, 1024, 4096, 16384, 65536)
_VOCABULARIES = {"byte": 257, "gpt2": 50257}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Exact parameters, training FLOPs and state bytes of a model, from its config alone."""

    recipe: Positional[str] = "quickstart"
    """A shipped recipe, a .toml or .json file, or a run's folder."""
    json: bool = False
    """Print one JSON object."""


def main(argv: list[str]) -> int:
    """Count and print."""
    arguments: Any
    arguments, given = parse(add_flags(Arguments), argv, command="info")
    run = Path(arguments.recipe) / "config.json"
    config = read_recipe(str(run) if run.is_file() else arguments.recipe, arguments, given)
    model = _with_vocabulary(config.model, config.data.tokenizer)
    facts = _facts(model)
    if arguments.json:
        print(json.dumps(facts))
    else:
        _show(model, facts)
    return 0


def _with_vocabulary(model: LanguageModelConfig, tokenizer: str) -> LanguageModelConfig:
    """The model with the vocabulary its tokenizer will have, where that can be told without reading data."""
    if model.vocab_size:
        return model
    bpe = parse_bpe(tokenizer)
    size = bpe[0] if bpe else _VOCABULARIES.get(tokenizer, 0)
    if not size:
        raise UsageError(f"the vocabulary of the tokenizer {tokenizer!r} depends on the data: add --vocab_size N")
    return replace(model, vocab_size=size)


def _facts(model: LanguageModelConfig) -> dict[str, Any]:
    parameters = count_parameters(model)
    lengths = [n for n in LENGTHS if not model.learned_positions or n <= model.learned_positions]
    return {
        "parameters": {
            "total": parameters.total,
            "active": parameters.active,
            "non_embedding": parameters.non_embedding,
            **{f"by_component.{name}": count for name, count in parameters.by_component.items()},
        },
        "lengths": lengths or [model.learned_positions],
        "training_flops_per_token": [training_flops_per_token(model, n) for n in lengths or [model.learned_positions]],
        "state_bytes": [state_bytes(model, n) for n in lengths or [model.learned_positions]],
    }


def _show(model: LanguageModelConfig, facts: dict[str, Any]) -> None:
    console = Console()
    console.print(f"{' '.join(model.pattern)}  (width {model.width}, vocabulary {model.vocab_size:,})", highlight=False)
    parameters = Table("parameters", title_justify="left")
    parameters.add_column("", justify="right")
    for name, count in facts["parameters"].items():
        parameters.add_row(name.removeprefix("by_component."), f"{count:,}")
    console.print(parameters)
    costs = Table("at length")
    for heading in ("training MFLOP a token", "state bytes (fp32, one sequence)"):
        costs.add_column(heading, justify="right")
    for length, flops, state in zip(
        facts["lengths"], facts["training_flops_per_token"], facts["state_bytes"], strict=True
    ):
        costs.add_row(f"{length:,}", f"{flops / 1e6:,.2f}", f"{state:,}")
    console.print(costs)
