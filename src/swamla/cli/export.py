"""`swamla export RUN FOLDER`: a trained model in a form that other programs load."""

from dataclasses import dataclass
from typing import Literal

from swamla.checkpoint import load
from swamla.cli.console import Console, say
from swamla.cli.flags import argument, parse
from swamla.cli.running import checked, run_folder
from swamla.export import save_gpt2

FORMATS = {"gpt2": save_gpt2}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write a trained model and its tokenizer as a folder that other programs load.

    run: the run's folder.
    folder: where to write: a missing or empty folder.
    format: gpt2: for GPT2LMHeadModel.from_pretrained of transformers; the model must be a GPT-2.
    checkpoint: best, latest, or a step.
    """

    run: str = argument(positional=True)
    folder: str = argument(positional=True)
    format: Literal["gpt2"] = "gpt2"
    checkpoint: str = "best"


def main(argv: list[str]) -> int:
    """Load and write."""
    arguments, _ = parse(Arguments, argv, command="swamla export")
    folder = checked(arguments.folder)
    model, tokenizer = load(run_folder(arguments.run), arguments.checkpoint)
    FORMATS[arguments.format](model, folder, tokenizer=tokenizer)
    files = ", ".join(sorted(path.name for path in folder.iterdir()))
    say(Console(), f"{folder} has {files}")
    return 0
