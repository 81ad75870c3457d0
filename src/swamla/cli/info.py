"""`swamla info RECIPE`: a model's layers and costs, from its config alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from swamla.cli.flags import argument, parse
from swamla.cli.info_tables import compare, show
from swamla.cli.overrides import flags
from swamla.cli.run_config import explain_recipe, read_recipe, with_vocabulary
from swamla.model.accounting import (
    all_mha_state_bytes,
    count_parameters,
    state_bytes,
    training_flops_per_token,
)
from swamla.model.language_model import LanguageModelConfig
from swamla.recipes import is_recipe
from swamla.train.config import RunConfig
from swamla.train.memory_advice import Place, training_bytes
from swamla.train.precision import resolve_device, resolve_precision

LENGTHS = (256, 1024, 4096, 16384, 65536)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Exact parameters, training FLOPs, state and training memory of a model, from its config alone.

    recipe: a shipped recipe, a .toml or .json file, a run's folder, or one of transformers; flags change it.
    compare: another recipe or run to compare with.
    json: print one JSON object, or a list of two with --compare.
    output_dir, run_name, workers, verbose: no effect; accepted so that a training's command line can be used as it is.
    """

    recipe: str = argument("", positional=True, default="quickstart")
    compare: str = argument("", metavar="RECIPE")
    json: bool = False
    output_dir: str = argument("", usual=False)
    run_name: str = argument("", usual=False)
    workers: int = argument(0, usual=False)
    verbose: bool = argument(False, switch=True, usual=False)


def main(argv: list[str]) -> int:
    """Count and print."""
    argv = _both_behind_compare(argv)
    arguments, given = parse(Arguments, argv, command="swamla info", more=flags(), explain=explain_recipe)
    found = [_facts_of(arguments.recipe or "quickstart", given)]
    if arguments.compare:
        found.append(_facts_of(arguments.compare, {}))
    if arguments.json:
        print(json.dumps(found if arguments.compare else found[0]))
    elif arguments.compare:
        compare(*found)
    else:
        show(found[0])
    return 0


def _both_behind_compare(argv: list[str]) -> list[str]:
    """`--compare A B` as `A --compare B`."""
    for index in (i for i, token in enumerate(argv) if token == "--compare"):
        both = argv[index + 1 : index + 3]
        if len(both) == 2 and not any(token.startswith("-") for token in both):
            return [*argv[:index], both[0], "--compare", both[1], *argv[index + 3 :]]
    return argv


def _facts_of(recipe: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All facts about a recipe or run, as plain data."""
    run, named = (folder / recipe / "config.json" for folder in (Path(), Path("runs")))
    named_run = named.is_file() and not is_recipe(recipe)
    config = read_recipe(str(run) if run.is_file() else str(named) if named_run else recipe, given)
    config = replace(config, model=with_vocabulary(config.model, config.data))
    data = {"source": config.data.source, "tokenizer": config.data.tokenizer}
    return {"name": recipe, "data": data, **_model(config.model), **_costs(config.model), "training": _training(config)}


def _model(model: LanguageModelConfig) -> dict[str, Any]:
    """Shape and parameters."""
    counted = count_parameters(model)
    layers = {}
    for name in dict.fromkeys(model.pattern):
        block = model.blocks[name]
        layers[name] = {
            "count": model.pattern.count(name),
            "mixer": {"kind": block.mixer.kind, **_settings(block.mixer)},
            **_settings(block),
            "ffn": {"kind": block.ffn.kind, **_settings(block.ffn), **block.ffn.widths(model.width)},
        }
    return {
        "width": model.width,
        "vocab_size": model.vocab_size,
        "learned_positions": model.learned_positions,
        "ngram_buckets": list(model.ngram_buckets),
        "tied_head": model.tied_head,
        "norm": {"kind": model.norm.kind, **_settings(model.norm)},
        "pattern": list(model.pattern),
        "blocks": layers,
        "parameters": {
            "total": counted.total,
            "active": counted.active,
            "non_embedding": counted.non_embedding,
            "by_component": counted.by_component,
        },
    }


def _settings(config: Any) -> dict[str, Any]:
    """The whole numbers of a config, and what else is chosen otherwise than by default; without backends."""
    default = {field.name: field.default for field in fields(config)}
    told = {name: "none" if value is None else value for name, value in config.__dict__.items() if name != "backend"}
    return {
        name: value
        for name, value in told.items()
        if isinstance(value, int) or (isinstance(value, float | str) and config.__dict__[name] != default[name])
    }


def _costs(model: LanguageModelConfig) -> dict[str, Any]:
    """FLOPs and state by length."""
    fitting = [n for n in LENGTHS if not model.learned_positions or n <= model.learned_positions]
    lengths = fitting or [model.learned_positions]
    return {
        "lengths": lengths,
        "training_flops_per_token": [training_flops_per_token(model, n) for n in lengths],
        "state_bytes": [state_bytes(model, n) for n in lengths],
        "all_mha_state_bytes": [all_mha_state_bytes(model, n) for n in lengths],
    }


def _training(config: RunConfig) -> dict[str, Any]:
    """Memory of a training step of the recipe; the activations are an estimate."""
    train = config.train
    precision = resolve_precision(train.precision, resolve_device(train.device), race=False)
    parts = training_bytes(config, Place(precision=precision))
    return {
        "optimizer": train.optimizer.kind,
        "precision": precision,
        "micro_batch": [train.batch_size // train.accumulation, train.block_size],
        "checkpointing": train.checkpointing,
        "bytes": parts | {"sum": sum(parts.values())},
    }
