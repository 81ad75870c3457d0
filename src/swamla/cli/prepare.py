"""`swamla prepare DATA`: tokenize now what training would tokenize first."""

from dataclasses import dataclass

from swamla.cli.flags import Positional, parse
from swamla.config import from_plain, load_file
from swamla.data.config import DataConfig
from swamla.data.prepare import prepare
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
    place = None
    if arguments.data in recipe_names():
        recipe, place = load_file(recipe_path(arguments.data))
        plain = recipe["data"]
    elif "source" in given:
        raise UsageError(f"--source goes with a recipe ({', '.join(recipe_names())}), and {arguments.data} is none")
    plain |= {name: getattr(arguments, name) for name in ("source", "tokenizer", "held_out_fraction") if name in given}
    config = from_plain(DataConfig, plain, path="data", origin=place or "command line")
    dataset = prepare(config, progress=print)
    for name, split in (("training", dataset.train), ("held out", dataset.held_out)):
        print(f"{name}: {split.n_documents:,} documents, {split.n_tokens:,} tokens, {split.n_bytes:,} bytes")
    print(f"tokenizer: {config.tokenizer}, vocabulary {dataset.tokenizer.vocab_size:,}")
    return 0
