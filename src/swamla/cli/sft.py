"""`swamla sft RUN --data chat.jsonl`: fine-tune a model on conversations."""

import math
import shlex
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swamla import distributed
from swamla.checkpoint import load, read_run_config
from swamla.cli.afterwards import say_next
from swamla.cli.console import Console, harmless, program, say, say_wrapped
from swamla.cli.flags import Flag, argument, parse
from swamla.cli.outputs import after_training
from swamla.cli.overrides import flags
from swamla.cli.run_config import read_recipe
from swamla.cli.running import (
    begun_folder,
    claim_folder,
    naming_resume_command,
    prepare_data,
    resumed_folder,
    run_folder,
)
from swamla.data.chat_rows import ChatDataset
from swamla.data.config import CHAT
from swamla.errors import UsageError
from swamla.evaluate import validation
from swamla.text import answer
from swamla.train import RunConfig, train
from swamla.train.changes import extension
from swamla.train.claims import Claim, claim_run
from swamla.train.init_from import origin_of
from swamla.train.launch import this_launch

RECIPE = Path(__file__).with_name("sft.toml")
LORA_LR = 5e-3  # adapters, half of which begin at 0, take some ten times the rate of all weights (arXiv 2106.09685)
LENGTH = 512  # of rows, where nothing says how long the model's were
_UNPLANNED = 10**9  # steps, before the data says how many an epoch has
ANSWER_TOKENS = 120


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Fine-tune a model on the conversations of --data. All flags of train apply too: swamla train --help.

    run: what to start from: a run, one of its checkpoints, or a folder of transformers; like --init_from.
    epochs: passes over the conversations, unless --steps or --max_minutes is given.
    output_dir: the new run's folder; by default runs/NAME-sft, numbered if that exists.
    resume: continue the fine-tuning in this folder, in output_dir, or the newest runs/NAME-sft.
    verbose: print details of the data and measurements too.
    """

    run: str = argument("", positional=True, default="")
    epochs: float = 3.0
    output_dir: str = argument("", metavar="FOLDER")
    resume: str = argument("", metavar="RUN", bare="")
    verbose: bool = argument(False, switch=True, usual=False)


def main(argv: list[str]) -> int:
    """Train, answer a question, and suggest the next commands."""
    arguments, given = parse(Arguments, argv, command="swamla sft", more=_flags())
    if not 0 < arguments.epochs < math.inf:
        raise UsageError(f"--epochs {arguments.epochs}: must be > 0, e.g. 3")
    with distributed.started():
        _run(arguments, given)
    return 0


def _run(arguments: Arguments, given: Mapping[str, Any]) -> None:
    """The work of every process; the main one has the run's folder."""
    name = f"{Path(_origin(arguments, given) or 'model').resolve().name}-sft"
    launch = this_launch() if distributed.started_again() else ()
    folder = arguments.resume or arguments.output_dir
    found = distributed.on_main(lambda: begun_folder(launch, folder, name) if launch else None)
    begun, stopped = found or (None, False)
    if stopped:
        say(Console(), f"not started again: the run in {begun} was asked to stop, and is saved")
        return
    resume = "resume" in given or begun is not None
    with ExitStack() as stack:
        claims: list[Claim] = []

        def claim() -> Path:
            claims.append(stack.enter_context(_claimed(arguments, name, begun, resume)))
            return claims[0].path

        run_dir = distributed.on_main(claim)
        config = _resumed(run_dir, given) if resume else _planned(arguments, given)
        _fine_tune(config, arguments, given, run_dir, claims[0] if claims else None, resume=resume)


def _flags() -> dict[str, Flag]:
    """Those of train; --help shows those of conversations and adapters, and none that would be another model."""
    shown = {"lora", "lora_alpha", "template", "on_long_row", "on_bad_row"}
    hidden = {"pattern", "local_mixer", "n_layers", "n_heads", "width", "vocab_size", "text_column", "tokenizer"}
    known = flags()
    usual = {name: name in shown or (flag.usual and name not in hidden) for name, flag in known.items()}
    return {name: replace(flag, usual=usual[name]) for name, flag in known.items()}


def _claimed(arguments: Arguments, name: str, begun: Path | None, resume: bool) -> Claim:
    """The folder of the new run, or of the one to resume. begun: what this launch began before it was restarted."""
    if not resume:
        return claim_folder(arguments.output_dir, name)
    return claim_run(begun or resumed_folder(arguments.resume, arguments.output_dir, name))


def _origin(arguments: Arguments, given: Mapping[str, Any]) -> str:
    """What the model begins as, "" if it is not said. Raises `UsageError` if it is said twice."""
    if arguments.run and "init_from" in given:
        raise UsageError(f"RUN {arguments.run} and --init_from {given['init_from']}: both name the start: give one")
    return str(run_folder(arguments.run)) if arguments.run else str(given.get("init_from", ""))


def _resumed(run_dir: Path, given: Mapping[str, Any]) -> RunConfig:
    return read_recipe(str(run_dir / "config.json"), _of_conversations(given))


def _of_conversations(given: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of `swamla train`, where --data is the file of conversations."""
    kept = {name: value for name, value in given.items() if name not in ("epochs", "output_dir", "resume", "verbose")}
    if "data" in kept and not kept["data"].startswith(CHAT):
        kept["data"] = CHAT + kept["data"]
    return kept


def _planned(arguments: Arguments, given: Mapping[str, Any]) -> RunConfig:
    """The config of a new run, with steps without a plan yet where the epochs count."""
    origin = _origin(arguments, given)
    if not origin:
        raise UsageError("sft needs a model to start from: swamla sft RUN --data chat.jsonl")
    if "data" not in given:
        raise UsageError('sft needs conversations: --data chat.jsonl, a row {"messages": […]} on each line')
    wanted = _of_conversations(given) | {"init_from": origin}
    wanted.setdefault("block_size", _length(origin, str(given.get("init_checkpoint", "best"))))
    if given.get("lora"):
        wanted.setdefault("lr", LORA_LR)
    if given.keys() & {"steps", "max_minutes"}:
        if "epochs" in given:
            raise UsageError("--epochs and --steps or --max_minutes both say how long to train: give one")
    else:
        wanted["steps"] = _UNPLANNED
    return read_recipe(str(RECIPE), wanted, new=True)


def _length(origin: str, which: str) -> int:
    """Tokens of a row: as in the run that the weights are from, and no more than learned positions."""
    start = origin_of(origin, which)
    length = int(read_run_config(start.folder)["train"]["block_size"]) if start.is_run else LENGTH
    return min(length, start.model.learned_positions or length)


def _fine_tune(
    config: RunConfig,
    arguments: Arguments,
    given: Mapping[str, Any],
    run_dir: Path,
    claim: Claim | None,
    *,
    resume: bool,
) -> None:
    console = Console()
    say_wrapped(console, f"resuming {run_dir}" if resume else f"fine-tuning {config.train.init_from} in {run_dir}")
    resumed, block_size = run_dir if resume else None, config.train.block_size
    dataset = prepare_data(config.data, console, block_size=block_size, resumed=resumed, verbose=arguments.verbose)
    if not isinstance(dataset, ChatDataset):
        raise UsageError(f"{run_dir}: was not trained on conversations: {program()} train --resume {run_dir}")
    if config.train.steps == _UNPLANNED:
        rows = arguments.epochs * dataset.rows(block_size, config.train.seed).n_rows
        config = replace(config, train=replace(config.train, steps=max(1, math.ceil(rows / config.train.batch_size))))
    evaluate = validation(dataset, block_size, config.train.eval_tokens, config.train.eval_part)
    with naming_resume_command("sft", run_dir):
        state = train(
            config,
            run_dir,
            dataset=dataset,
            evaluate=evaluate,
            resume=resume,
            console=console,
            claim=claim,
            verbose=arguments.verbose,
        )
    with after_training(run_dir):
        distributed.on_main(lambda: say_answer(console, run_dir, dataset))
        run = shlex.quote(str(run_dir))
        longer = f"sft --resume {run} {extension(config.train, step=state.step, seconds=state.seconds)}"
        what = f"{run_dir} has config.json, metrics.jsonl, loss.png and the checkpoints."
        talk = [f"chat {run}"] if dataset.special_ids else []
        say_next(console, what, [*talk, f"evaluate {run}", longer, f"export {run} OUT"])


def say_answer(console: Console, run_dir: Path, dataset: ChatDataset) -> None:
    """Print a held-out question, and how the model answers it; nothing if it can read none of them."""
    model, tokenizer = load(run_dir)
    found = dataset.question(model.config.learned_positions)
    if found is None:
        return
    asked, expected = found
    told = answer(model, tokenizer, asked, ANSWER_TOKENS, template=dataset.config.template)
    say(console, f"\n=== a held-out question ===\n{harmless(asked[-1]['content'])}")
    say(console, f"=== the answer there ===\n{harmless(expected)}\n=== the model's ===\n{harmless(told)}\n")
