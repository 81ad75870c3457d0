"""`swamla train [RECIPE] …`: a new run, or one taken up again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swamla.cli.console import Console, say
from swamla.cli.flags import Positional, parse
from swamla.cli.overrides import add_flags
from swamla.cli.run_config import read_recipe
from swamla.cli.running import new_folder, prepare_data, resume_here, resumed_folder, run_training
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
    """Continue the run in this folder, or in output_dir, or the newest of that name, bit for bit."""


Arguments.__doc__ = f"""Train a model, on whatever --data points to. Recipes: {", ".join(recipe_names())}."""


def main(argv: list[str]) -> int:
    """Train, and say where the run is."""
    arguments: Any
    arguments, given = parse(add_flags(Arguments), resume_here(argv), command="train")
    resume = "resume" in given
    run_dir = _folder(arguments, resume)
    recipe = str(run_dir / "config.json") if resume else arguments.recipe
    config = read_recipe(recipe, arguments, given)
    console = Console()
    say(console, f"{'resuming' if resume else 'training'} {recipe} in {run_dir}")
    dataset = prepare_data(config.data, console, block_size=config.train.block_size)
    run_training(config, dataset, run_dir, console, command="train", resume=resume)
    say(console, f"the run is in {run_dir}")
    return 0


def _folder(arguments: Any, resume: bool) -> Path:
    """The folder of a new run, or the one to go on in."""
    name = _check_name(arguments.run_name or Path(arguments.recipe).stem)
    parent = arguments.output_dir
    folder = str(Path(parent, name)) if parent and arguments.run_name else parent
    return resumed_folder(arguments.resume, folder, name) if resume else new_folder(folder, name)


def _check_name(name: str) -> str:
    """A run's name is one plain folder name."""
    if "\0" in name or name in (".", "..") or Path(name).name != name:
        raise UsageError(f"--run_name {name!r}: must be a plain folder name, without / .. or NUL, e.g. first-try")
    return name
