"""`swamla export RUN FOLDER`: a trained model in a form that other programs load."""

from dataclasses import dataclass

from swamla.checkpoint import load
from swamla.checkpoint.run import read_run_config
from swamla.cli.console import Console, say
from swamla.cli.flags import argument, parse
from swamla.cli.running import checked, run_folder
from swamla.interop import save_pretrained


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write a trained model and its tokenizer as a folder that other programs load.

    run: the run's folder.
    folder: where to write: a missing or empty folder.
    to: an architecture of transformers that equals the model, e.g. llama or mistral; swamla: our own, which has every
        model and needs swamla where it is loaded; auto for the first that equals it, else swamla.
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
    run = run_folder(arguments.run)
    model, tokenizer = load(run, arguments.checkpoint)
    length = read_run_config(run)["train"]["block_size"]
    written = save_pretrained(model, folder, to=arguments.to, tokenizer=tokenizer, trained_length=length)
    files = ", ".join(sorted(path.name for path in folder.iterdir()))
    say(Console(), f"{folder} is {written.kind} ({written.class_name}) of transformers: {files}")
    if written.has_every_model:
        say(Console(), "Load it after `import swamla.interop.transformers`, or with trust_remote_code=True.")
    return 0
