"""From a recipe and flags to a `RunConfig`: defaults, then the recipe, then the command line."""

import copy
from typing import Any

from swamla.cli.overrides import apply
from swamla.config import from_plain, load_file, within
from swamla.errors import require
from swamla.recipes import recipe_path
from swamla.train.config import RunConfig


def read_recipe(recipe: str, arguments: Any, given: frozenset[str]) -> RunConfig:
    """The run that a recipe (a shipped one's name, or a file) and the flags in `given` describe.

    Raises `UsageError` and `ConfigError`, which name the flag or the file and line at fault.
    """
    path = recipe_path(recipe)
    plain, place = load_file(path)
    plain = copy.deepcopy(plain)
    plain.pop("format_version", None)  # a run's own config.json is a recipe too
    flags = apply(plain, arguments, given) if _has_model(plain) else {}

    def origin(field: str) -> str:
        parts = field.split(".")
        general = ".".join([*parts[:2], "*", *parts[3:]]) if field.startswith("model.blocks.") else field
        return flags.get(field) or flags.get(general) or place(field)

    config = from_plain(RunConfig, plain, origin=origin)
    with within("", origin):
        _check_together(config)
    return config


def _check_together(config: RunConfig) -> None:
    """What no section of the config can see alone."""
    positions, block_size = config.model.learned_positions, config.train.block_size
    fits = not positions or block_size <= positions
    require(fits, "train.block_size", block_size, f"must not exceed model.learned_positions = {positions}")


def _has_model(plain: dict[str, Any]) -> bool:
    """False for data so malformed that flags could not be laid on it; the reader will say what is wrong."""
    sections = all(isinstance(plain.get(name, {}), dict) for name in ("model", "data", "train"))
    blocks = plain.get("model", {}).get("blocks") if sections else None
    return isinstance(blocks, dict) and all(
        isinstance(b, dict) and isinstance(b.get("mixer"), dict) for b in blocks.values()
    )
