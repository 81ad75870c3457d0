"""`swamla train [RECIPE] …`: a new run, or one taken up again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from swamla.cli.flags import Positional, parse
from swamla.cli.overrides import add_flags
from swamla.cli.run_config import read_recipe
from swamla.cli.running import checked, new_folder, prepare_data, run_training, say
from swamla.errors import UsageError
from swamla.recipes import recipe_names


@dataclass(frozen=True, kw_only=True)
class Arguments:
    recipe: Positional[str] = "quickstart"
    """A shipped recipe, or a .toml or .json file. Flags change what it says."""
    output_dir: str = ""
    """The run's folder. By default runs/NAME, numbered when that is taken; with --run_name, its parent."""
    run_name: str = ""
    """NAME of the folder, under runs/ or output_dir; by default the recipe's."""
    resume: str = ""
    """Continue the run in output_dir, or in the folder given here, from its last checkpoint, bit for bit."""


Arguments.__doc__ = f"""Train a model, on whatever --data points to. Recipes: {", ".join(recipe_names())}."""


def main(argv: list[str]) -> int:
    """Train, and say where the run is."""
    arguments: Any
    arguments, given = parse(add_flags(Arguments), _resume_here(argv), command="train")
    resume = "resume" in given
    run_dir = _resumed_folder(arguments) if resume else _new_folder(arguments)
    recipe = str(run_dir / "config.json") if resume else arguments.recipe
    config = read_recipe(recipe, arguments, given)
    console = Console()
    say(console, f"{'resuming' if resume else 'training'} {recipe} in {run_dir}")
    run_training(config, prepare_data(config.data, console), run_dir, console, resume=resume)
    say(console, f"the run is in {run_dir}")
    return 0


def _resume_here(argv: list[str]) -> list[str]:
    """A bare --resume, followed by no folder, means the run in output_dir: written out for the parser."""
    return [
        "--resume=" if token == "--resume" and (index + 1 == len(argv) or argv[index + 1].startswith("--")) else token
        for index, token in enumerate(argv)
    ]


def _new_folder(arguments: Any) -> Path:
    name = _check_name(arguments.run_name or Path(arguments.recipe).stem)
    parent = arguments.output_dir
    return new_folder(str(Path(parent, name)) if parent and arguments.run_name else parent, name)


def _resumed_folder(arguments: Any) -> Path:
    """The folder to go on in; it must hold a run."""
    if arguments.resume and arguments.output_dir:
        raise UsageError("--resume RUN and --output_dir both name a folder: give one of them")
    name = _check_name(arguments.run_name or Path(arguments.recipe).stem)
    folder = checked(arguments.resume or arguments.output_dir or f"runs/{name}")
    if arguments.output_dir and arguments.run_name:
        folder = folder / name
    if not (folder / "config.json").is_file():
        raise UsageError(f"--resume: {folder} holds no run to continue (it has no config.json)")
    return folder


def _check_name(name: str) -> str:
    """A run's name is one plain folder name."""
    if "\0" in name or name in (".", "..") or Path(name).name != name:
        raise UsageError(f"--run_name {name!r}: must be a plain folder name, without / .. or NUL, e.g. first-try")
    return name
