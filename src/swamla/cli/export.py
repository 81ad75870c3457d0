"""`swamla export RUN FOLDER`: a trained model in a form that other programs load."""

from dataclasses import dataclass

from swamla.checkpoint import load
from swamla.cli.console import Console, say
from swamla.cli.flags import argument, parse
from swamla.cli.running import checked, run_folder
from swamla.interop import save_pretrained


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write a trained model and its tokenizer as a folder that other programs load.

    run: the run's folder.
    folder: where to write: a missing or empty folder.
    to: an architecture of transformers that equals the model, e.g. llama or mistral; auto for the first that does.
    checkpoint: best, latest, or a step.
    """

    run: str = argument(positional=True)
    folder: str = argument(positional=True)
    to: str = "auto"
    checkpoint: str = "best"


def main(argv: list[str]) -> int:
    """Load and write."""
    arguments, _ = parse(Arguments, argv, command="swamla export")
    folder = checked(arguments.folder)
    model, tokenizer = load(run_folder(arguments.run), arguments.checkpoint)
    architecture = save_pretrained(model, folder, to=arguments.to, tokenizer=tokenizer)
    files = ", ".join(sorted(path.name for path in folder.iterdir()))
    say(Console(), f"{folder} is {architecture.kind} ({architecture.class_name}) of transformers: {files}")
    return 0
