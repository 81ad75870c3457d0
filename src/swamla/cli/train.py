"""`swamla train [RECIPE] …`: a new run, or one taken up again."""

import shlex
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from swamla import distributed
from swamla.cli.console import Console, program, say
from swamla.cli.flags import Positional, parse
from swamla.cli.original_flags import add_original_flags, bare_compile, refusal, workers
from swamla.cli.overrides import add_flags
from swamla.cli.run_config import Resolved, begun_recipe, chosen_recipe, resolve, say_notes
from swamla.cli.running import (
    begun_folder,
    claim_folder,
    fetch_run,
    prepare_data,
    resume_here,
    resumed_folder,
    run_training,
)
from swamla.config import within
from swamla.errors import UsageError
from swamla.hub import require_hub
from swamla.recipes import recipe_names
from swamla.train.changes import check_same_run
from swamla.train.claims import Claim, claim_run
from swamla.train.launch import this_launch


@dataclass(frozen=True, kw_only=True)
class Arguments:
    recipe: Annotated[Positional[str], tyro.conf.arg(help_behavior_hint="(default: quickstart)")] = ""
    """A shipped recipe, or a .toml or .json file. Flags change what it says."""
    size: str = ""
    """The recipe, as a flag."""
    output_dir: str = ""
    """The run's folder. By default runs/NAME, numbered when that is taken; with --run_name, its parent."""
    run_name: str = ""
    """NAME of the folder, under runs/ or output_dir; by default the recipe's."""
    resume: str = ""
    """Continue the run in this folder, or in output_dir, or the newest of that name, bit for bit."""
    resume_from: str = ""
    """The same; a folder must be named."""
    resume_from_hf: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue the run in --hf_repo_id, in a new folder."""
    hf_revision: str = ""
    """Of the repository: a branch, a tag or a commit; by default the newest."""


Arguments.__doc__ = f"""Train a model, on whatever --data points to. Recipes: {", ".join(recipe_names())}."""


def main(argv: list[str]) -> int:
    """Train, and say where the run is."""
    arguments: Any
    takes = add_flags(add_original_flags(Arguments))
    arguments, given = parse(takes, bare_compile(resume_here(argv)), command="train", refusal=refusal)
    with distributed.started():
        return _train(arguments, given)


def _train(arguments: Any, given: frozenset[str]) -> int:
    """What every process of the run does."""
    unnamed = "init_from" in given and not (arguments.recipe or arguments.size)
    console, (named, name) = Console(), _recipe_and_name(arguments, unnamed)
    from_hub, resume = _is_from_hub(arguments, given), not given.isdisjoint(("resume", "resume_from"))
    if from_hub:
        name = arguments.hf_repo_id
    if "init_from" in given and (resume or from_hub):
        raise UsageError("--init_from begins a new run with another's weights, --resume goes on with one: give one")
    launch = this_launch() if distributed.started_again() else ()
    begun, stopped = distributed.on_main(lambda: _begun(arguments, name, launch)) or (None, False)
    if begun is not None and stopped:
        go_on = f"{program()} train --resume {shlex.quote(str(begun))}"
        say(console, f"not started again: the run in {begun} was asked to stop, and is saved; go on with: {go_on}")
        return 0
    from_hub, resume = from_hub and begun is None, resume or begun is not None
    # A mistake is told before all else.
    resolved = None if resume or from_hub else resolve(named, arguments, given, new=True, unnamed=unnamed)
    with ExitStack() as held:
        claims: list[Claim] = []  # the main process's, which takes the folder before anything that takes time

        def take(claim: Claim) -> Path:
            claims.append(held.enter_context(claim))
            return claim.path

        run_dir = distributed.on_main(lambda: take(_claimed(arguments, name, begun, resume)))
        if from_hub:
            distributed.on_main(lambda: fetch_run(arguments.hf_repo_id, run_dir, arguments.hf_revision, console))
            distributed.on_main(lambda: take(claim_run(run_dir)))  # it is another folder now
            resume = True
        recipe = str(run_dir / "config.json") if resume else named
        resolved = resolved or resolve(recipe, arguments, given)
        config = resolved.config
        say_notes(resolved)
        if resume:
            distributed.on_main(lambda: _check_resumed(resolved, run_dir, arguments, given))
        require_hub(config.train.hf_repo_id)
        distributed.require_rows(config.train.batch_size, config.train.accumulation)
        say(console, f"{'resuming' if resume else 'training'} {recipe} in {run_dir}")
        dataset = prepare_data(
            config.data,
            console,
            block_size=config.train.block_size,
            workers=workers(arguments, given),
            resumed=run_dir if resume else None,
        )
        claim = claims[-1] if claims else None
        run_training(config, dataset, run_dir, console, command="train", resume=resume, claim=claim)
    say(console, f"the run is in {run_dir}")
    return 0


def _recipe_and_name(arguments: Any, unnamed: bool) -> tuple[str, str]:
    """The recipe, and what the run is called after: without a recipe the run whose weights it begins with."""
    if not unnamed:
        named = chosen_recipe(arguments.recipe, arguments.size)
        return named, named
    return begun_recipe(arguments.init_from), Path(arguments.init_from).resolve().name


def _check_resumed(resolved: Resolved, run_dir: Path, arguments: Any, given: frozenset[str]) -> None:
    """Raise, before any data is read, for flags that would make another run of it, and for a recipe of another model.

    A recipe beside a bare --resume only says which run is meant.
    """
    with within("", resolved.origin):
        check_same_run(resolved.config, run_dir)
    recipe = arguments.recipe or arguments.size
    if not recipe or not (arguments.resume or arguments.resume_from or arguments.output_dir):
        return
    wanted, model = resolve(recipe, arguments, given).config.model, resolved.config.model
    if replace(wanted, vocab_size=model.vocab_size) != model:
        raise UsageError(
            f"{recipe} is another model than that of the run {run_dir}: leave {recipe} out to go on with the run, "
            "or --resume to start a new one"
        )


def _begun(arguments: Any, recipe: str, launch: tuple[str, ...]) -> tuple[Path, bool] | None:
    """The run that this very launch had begun when torchrun started all again, and whether it was asked to stop."""
    folder, name = _named_folder(arguments, recipe)
    return begun_folder(launch, arguments.resume or arguments.resume_from or folder, name) if launch else None


def _claimed(arguments: Any, recipe: str, begun: Path | None, resume: bool) -> Claim:
    """The folder of a new run, or the one to go on in, taken."""
    folder, name = _named_folder(arguments, recipe)
    if not resume:
        return claim_folder(folder, name)
    return claim_run(begun or resumed_folder(arguments.resume or arguments.resume_from, folder, name))


def _named_folder(arguments: Any, recipe: str) -> tuple[str, str]:
    """The folder that the flags say, "" where it is to be found by the run's name, and that name."""
    name = _check_name(arguments.run_name or Path(recipe).stem)
    parent = arguments.output_dir
    return (str(Path(parent, name)) if parent and arguments.run_name else parent), name


def _is_from_hub(arguments: Any, given: frozenset[str]) -> bool:
    """Whether the run is one on the hub. Raises `UsageError` where that cannot be told which, or is told otherwise."""
    if not arguments.resume_from_hf:
        if arguments.hf_revision:
            raise UsageError("--hf_revision is of the repository that --resume_from_hf continues: give both, or none")
        return False
    if "hf_repo_id" not in given:
        raise UsageError("--resume_from_hf: say of which repository: --hf_repo_id USER/NAME")
    if arguments.recipe or not given.isdisjoint(("resume", "resume_from", "size")):
        raise UsageError("--resume_from_hf takes the recipe, and the run, from the hub: no other can be named")
    return True


def _check_name(name: str) -> str:
    """A run's name is one plain folder name."""
    if "\0" in name or name in (".", "..") or Path(name).name != name:
        raise UsageError(f"--run_name {name!r}: must be a plain folder name, without / .. or NUL, e.g. first-try")
    return name
