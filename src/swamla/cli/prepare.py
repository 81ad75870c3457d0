"""`swamla prepare DATA`: tokenize now what training would tokenize first."""

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console

from swamla.cli.flags import Positional, parse
from swamla.cli.running import prepare_data
from swamla.config import from_plain, load_file
from swamla.data.config import DataConfig
from swamla.errors import UsageError
from swamla.recipes import recipe_names, recipe_path


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Tokenize data ahead of training, into the cache that training looks in."""

    data: Positional[str]
    """A recipe, whose data is taken, or a source: stdlib, a file or a folder."""
    source: str = ""
    """Where the recipe's text is, instead of where the recipe says (shakespeare-char would download it)."""
    tokenizer: str = ""
    """byte, char, bpe:N, gpt2, gpt2:FOLDER or a tokenizer.json."""
    held_out_fraction: float = 0.0
    """The share of documents never trained on (0: the default)."""


def main(argv: list[str]) -> int:
    """Prepare and say what there is."""
    arguments, given = parse(Arguments, argv, command="prepare")
    plain: dict[str, object] = {"source": arguments.data}
    written: Callable[[str], str] = _nowhere
    if arguments.data in recipe_names() or arguments.data.endswith(".toml"):
        recipe, written = load_file(recipe_path(arguments.data))
        plain = recipe.get("data", {})
    elif "source" in given:
        raise UsageError(f"--source goes with a recipe ({', '.join(recipe_names())}), and {arguments.data} is none")
    plain |= {name: value for name, value in arguments.__dict__.items() if name in given}
    flags = {f"data.{name}": f"--{name}" for name in given}
    config = from_plain(DataConfig, plain, path="data", origin=lambda field: flags.get(field) or written(field))
    prepare_data(config, Console()).verify()
    return 0


def _nowhere(field: str) -> str:
    """Where a field stands that no file gave."""
    return ""
