"""`swamla train [RECIPE] …`: start a run, or resume one."""

import shlex
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swamla import distributed
from swamla.cli.afterwards import say_results
from swamla.cli.console import Console, program, say, say_wrapped
from swamla.cli.flags import argument, parse
from swamla.cli.outputs import after_training
from swamla.cli.overrides import flags
from swamla.cli.run_config import Resolved, begun_recipe, explain_recipe, resolve, say_notes
from swamla.cli.running import (
    begun_folder,
    claim_folder,
    fetch_run,
    naming_resume_command,
    prepare_data,
    resumed_folder,
)
from swamla.config import within
from swamla.errors import UsageError
from swamla.evaluate import validation
from swamla.hub.push import require_hub
from swamla.train import train
from swamla.train.changes import check_same_run
from swamla.train.claims import Claim, claim_run
from swamla.train.launch import this_launch


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train a model on --data.

    recipe: a shipped recipe, or a .toml or .json file; flags change it.
    output_dir: the run's folder [runs/NAME, numbered if taken]; with --run_name its parent.
    run_name: NAME of the folder, under runs/ or output_dir [the recipe's].
    resume: continue the run in this folder, in output_dir, or the newest of that name.
    resume_from_hf: continue the run in --hf_repo_id, in a new folder.
    hf_revision: of the repository: a branch, a tag or a commit; by default the newest.
    workers: processes that tokenize large data; 0 for one per core.
    verbose: print details of the data and measurements too.
    """

    recipe: str = argument("", positional=True, default="quickstart")
    output_dir: str = argument("", metavar="FOLDER")
    run_name: str = argument("", metavar="NAME")
    resume: str = argument("", metavar="RUN", bare="")
    resume_from_hf: bool = argument(False, switch=True, usual=False)
    hf_revision: str = argument("", usual=False)
    workers: int = argument(0, usual=False)
    verbose: bool = argument(False, switch=True, usual=False)


def main(argv: list[str]) -> int:
    """Train, and print where the run is."""
    arguments, given = parse(Arguments, argv, command="swamla train", more=flags(), explain=explain_recipe)
    if arguments.workers < 0:
        raise UsageError(f"--workers {arguments.workers}: must be >= 0, e.g. 4; 0 takes all cores")
    with distributed.started():
        return _train(arguments, given)


def _train(arguments: Arguments, given: Mapping[str, Any]) -> int:
    """The work of every rank."""
    unnamed = "init_from" in given and not arguments.recipe
    console, (named, name) = Console(), _recipe_and_name(arguments, given)
    from_hub, resume = _is_from_hub(arguments, given), "resume" in given
    if from_hub:
        name = given["hf_repo_id"]
    if "init_from" in given and (resume or from_hub):
        raise UsageError("--init_from starts a new run from another's weights, --resume continues one: give one")
    launch = this_launch() if distributed.started_again() else ()
    begun, stopped = distributed.on_main(lambda: _begun(arguments, name, launch)) or (None, False)
    if begun is not None and stopped:
        go_on = f"{program()} train --resume {shlex.quote(str(begun))}"
        say(console, f"not started again: the run in {begun} was asked to stop, and is saved; go on with: {go_on}")
        return 0
    from_hub, resume = from_hub and begun is None, resume or begun is not None
    # Report mistakes in flags and recipe before anything is written.
    resolved = None if resume or from_hub else resolve(named, given, new=True, unnamed=unnamed)
    with ExitStack() as stack:
        claims: list[Claim] = []  # on the main rank, which claims the folder before any slow step

        def take(claim: Claim) -> Path:
            claims.append(stack.enter_context(claim))
            return claim.path

        run_dir = distributed.on_main(lambda: take(_claimed(arguments, name, begun, resume)))
        if from_hub:
            distributed.on_main(lambda: fetch_run(given["hf_repo_id"], run_dir, arguments.hf_revision, console))
            distributed.on_main(lambda: take(claim_run(run_dir)))  # the download replaced the folder
            resume = True
        recipe = str(run_dir / "config.json") if resume else named
        resolved = resolved or resolve(recipe, given)
        config = resolved.config
        say_notes(resolved)
        if resume:
            distributed.on_main(lambda: _check_resumed(resolved, run_dir, arguments, given))
        require_hub(config.train.hf_repo_id)
        config.train.require_rows()
        say_wrapped(console, f"{'resuming' if resume else 'training'} {recipe} in {run_dir}")
        dataset = prepare_data(
            config.data,
            console,
            block_size=config.train.block_size,
            workers=arguments.workers or None,
            resumed=run_dir if resume else None,
            verbose=arguments.verbose,
        )
        claim = claims[-1] if claims else None
        evaluate = validation(dataset, config.train.block_size, config.train.eval_tokens, config.train.eval_part)
        first: list[int] = []
        with naming_resume_command("train", run_dir):
            state = train(
                config,
                run_dir,
                dataset=dataset,
                evaluate=evaluate,
                resume=resume,
                console=console,
                on_start=lambda begun: first.append(begun.step),
                claim=claim,
                verbose=arguments.verbose,
            )
    with after_training(run_dir):
        say(console, f"the run is in {run_dir}")
        if state.step > first[0]:
            say_results(console, run_dir, config, dataset, state)
    return 0


def _recipe_and_name(arguments: Arguments, given: Mapping[str, Any]) -> tuple[str, str]:
    """The recipe and the run's name, without a recipe those of the run in --init_from."""
    named = arguments.recipe or "quickstart"
    if arguments.recipe or "init_from" not in given:
        return named, named
    return begun_recipe(given["init_from"]), Path(given["init_from"]).resolve().name


def _check_resumed(resolved: Resolved, run_dir: Path, arguments: Arguments, given: Mapping[str, Any]) -> None:
    """Raise, before any data is read, for flags that would make it another run, and for a recipe of another model.

    With a bare --resume the recipe only selects the run.
    """
    with within("", resolved.origin):
        check_same_run(resolved.config, run_dir)
    recipe = arguments.recipe
    if not recipe or not (arguments.resume or arguments.output_dir):
        return
    wanted, model = resolve(recipe, given).config.model, resolved.config.model
    if replace(wanted, vocab_size=model.vocab_size) != model:
        raise UsageError(
            f"{recipe} is another model than that of the run {run_dir}: leave {recipe} out to continue the run, "
            "or --resume to start a new one"
        )


def _begun(arguments: Arguments, recipe: str, launch: tuple[str, ...]) -> tuple[Path, bool] | None:
    """The run that this launch started before torchrun restarted it, and whether it was asked to stop."""
    folder, name = named_folder(arguments, recipe)
    return begun_folder(launch, arguments.resume or folder, name) if launch else None


def _claimed(arguments: Arguments, recipe: str, begun: Path | None, resume: bool) -> Claim:
    """Claim the folder of a new run, or of the one to resume."""
    folder, name = named_folder(arguments, recipe)
    if not resume:
        return claim_folder(folder, name)
    return claim_run(begun or resumed_folder(arguments.resume, folder, name))


def named_folder(arguments: Arguments, recipe: str) -> tuple[str, str]:
    """The folder in the flags, "" if it follows from the run's name, and that name."""
    name = _check_name(arguments.run_name or Path(recipe).stem)
    parent = arguments.output_dir
    return (str(Path(parent, name)) if parent and arguments.run_name else parent), name


def _is_from_hub(arguments: Arguments, given: Mapping[str, Any]) -> bool:
    """Whether to resume from the hub. Raises `UsageError` if flags are missing or contradict that."""
    if not arguments.resume_from_hf:
        if arguments.hf_revision:
            raise UsageError("--hf_revision selects a revision for --resume_from_hf: give both, or none")
        return False
    if "hf_repo_id" not in given:
        raise UsageError("--resume_from_hf needs a repository: --hf_repo_id USER/NAME")
    if arguments.recipe or "resume" in given:
        raise UsageError("--resume_from_hf takes the recipe and the run from the hub: leave RECIPE and --resume out")
    return True


def _check_name(name: str) -> str:
    """A run's name must be a plain folder name."""
    if "\0" in name or name in (".", "..") or Path(name).name != name:
        raise UsageError(f"--run_name {name!r}: must be a plain folder name, without / .. or NUL, e.g. first-try")
    return name
