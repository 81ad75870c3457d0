"""`swamla prepare DATA`: tokenize now what training would tokenize first."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swamla.cli.console import Console, say
from swamla.cli.flags import Positional, parse
from swamla.cli.overrides import add_flags, data_flags, put_flags
from swamla.cli.running import prepare_data
from swamla.config import from_plain, load_file
from swamla.data.config import DataConfig
from swamla.data.download import keep_shakespeare
from swamla.data.preparing import cache_of
from swamla.errors import UsageError
from swamla.recipes import ALIASES, recipe_names, recipe_path


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Tokenize data ahead of training, into the cache that training looks in."""

    data: Positional[str]
    """A recipe, whose data is taken, or a source: stdlib, a file or a folder. --source replaces a recipe's source."""


def main(argv: list[str]) -> int:
    """Prepare, check every byte, and say what there is."""
    arguments: Any
    arguments, given = parse(add_flags(Arguments, data_flags()), argv, command="prepare")
    plain: dict[str, Any] = {"data": {"source": arguments.data}}
    written: Callable[[str], str] = _nowhere
    if arguments.data in (*recipe_names(), *ALIASES) or arguments.data.endswith((".toml", ".json")):
        plain, written = load_file(recipe_path(arguments.data))
    elif "source" in given:
        raise UsageError(f"--source goes with a recipe ({', '.join(recipe_names())}), and {arguments.data} is none")
    downloaded = plain.get("data", {}).get("source") == "shakespeare"
    flags = put_flags(plain, arguments.__dict__, given, data_flags())
    config = from_plain(
        DataConfig, plain.get("data", {}), path="data", origin=lambda field: flags.get(field) or written(field)
    )
    console = Console()
    if downloaded and "source" in given:
        config = _instead_of_download(config, arguments.data, console)
    prepare_data(config, console).verify()
    return 0


def _instead_of_download(config: DataConfig, recipe: str, console: Console) -> DataConfig:
    """`config`, with its file put where a later `swamla train` looks for the text that it would download."""
    if keep_shakespeare(cache_of(config), Path(config.source).expanduser()):
        return replace(config, source="shakespeare")
    say(console, f"{config.source} is another text than {recipe}'s: train on it with --data {config.source}")
    return config


def _nowhere(field: str) -> str:
    """Where a field stands that no file gave."""
    return ""
