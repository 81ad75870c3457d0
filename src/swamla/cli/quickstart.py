"""`swamla quickstart`: train a small hybrid model and compare it with compressors."""

import gzip
import lzma
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from swamla import distributed
from swamla.checkpoint import load
from swamla.cli.afterwards import few_tokens, generate_command, opening, sample, say_next
from swamla.cli.console import Console, harmless, say, say_wrapped
from swamla.cli.fitting import fitted
from swamla.cli.flags import argument, parse
from swamla.cli.outputs import after_training
from swamla.cli.overrides import flags
from swamla.cli.run_config import explain_recipe, read_recipe
from swamla.cli.running import (
    claim_folder,
    naming_resume_command,
    prepare_data,
    resumed_folder,
)
from swamla.data.dataset import Dataset
from swamla.errors import UsageError
from swamla.evaluate import validation
from swamla.train import RunConfig, TrainState, train
from swamla.train.changes import extension
from swamla.train.claims import Claim, claim_run
from swamla.train.precision import autocast, without_fp8

_AFTER = "\n\n=== after training ===\n"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train the recipe "quickstart", then compare the model with gzip and xz on held-out text.

    output_dir: the run's folder; by default runs/quickstart, numbered if that exists.
    resume: continue the run in this folder, in output_dir, or the newest runs/quickstart.
    verbose: print details of the data and measurements too.
    """

    output_dir: str = argument("", metavar="FOLDER")
    resume: str = argument("", metavar="RUN", bare="")
    verbose: bool = argument(False, switch=True, usual=False)


def main(argv: list[str]) -> int:
    """Train, sample, compare, and suggest the next commands."""
    if distributed.launched():
        raise UsageError("quickstart is for one process; to train the same model on several: train quickstart")
    arguments, given = parse(Arguments, argv, command="swamla quickstart", more=flags(), explain=explain_recipe)
    resume = "resume" in given
    with _claimed(arguments, resume) as claim:
        run_dir = claim.path
        config = read_recipe(str(run_dir / "config.json") if resume else "quickstart", given, new=not resume)
        if config.data.task is not None:
            raise UsageError("quickstart compares a model of texts with gzip; on a task: train toy-mqar --data task:…")
        if config.data.chat is not None:
            raise UsageError("quickstart compares a model of texts with gzip; on conversations: sft RUN --data FILE")
        _train(config, given, claim, resume, arguments.verbose)
    return 0


def _claimed(arguments: Arguments, resume: bool) -> Claim:
    """Claim the folder of a new run, or of the one to resume."""
    named = arguments.output_dir
    if not resume:
        return claim_folder(named, "quickstart")
    return claim_run(resumed_folder(arguments.resume, named, "quickstart"))


def _train(config: RunConfig, given: Mapping[str, Any], claim: Claim, resume: bool, verbose: bool) -> None:
    """Fit a new run to the machine, train, sample, compare, and suggest the next commands."""
    console, run_dir = Console(), claim.path
    say_wrapped(console, f"resuming {run_dir}" if resume else _announcement(config, run_dir))
    resumed = run_dir if resume else None
    dataset = prepare_data(config.data, console, block_size=config.train.block_size, resumed=resumed, verbose=verbose)
    assert isinstance(dataset, Dataset)  # of texts
    if not resume:
        config = fitted(config, "quickstart", given, dataset, partial(say, console))
    samples, prompt = run_dir / "samples.txt", opening(dataset)

    def first_sample(state: TrainState) -> None:
        if state.step == 0:  # written before training, so that a resumed run still has it
            before = sample(state.model, dataset.tokenizer, prompt)
            samples.write_text(f"=== before training ===\n{before}", encoding="utf-8")

    evaluate = validation(dataset, config.train.block_size, config.train.eval_tokens, config.train.eval_part)
    with naming_resume_command("quickstart", run_dir):
        state = train(
            config,
            run_dir,
            dataset=dataset,
            evaluate=evaluate,
            resume=resume,
            console=console,
            on_start=first_sample,
            claim=claim,
            verbose=verbose,
        )
    with after_training(run_dir):
        _results(console, config, dataset, state, run_dir, prompt)


def _results(
    console: Console, config: RunConfig, dataset: Dataset, state: TrainState, run_dir: Path, prompt: str
) -> None:
    """Print a sample, the comparison with compressors, and the next commands."""
    samples = run_dir / "samples.txt"
    model, tokenizer = load(run_dir)
    model = model.to(state.device)
    before = samples.read_text(encoding="utf-8").partition(_AFTER)[0] if samples.exists() else ""
    text = f"{before}{_AFTER}{sample(model, tokenizer, prompt)}\n"
    samples.write_text(text, encoding="utf-8")
    say(console, f"\n{harmless(text)}")
    say(console, "scoring all of the held-out text …")
    with autocast(without_fp8(state.precision), state.device):
        found = validation(dataset, config.train.block_size)(model)
    _compare(console, run_dir.name, found["bits_per_byte"], dataset.held_out_text())
    run = shlex.quote(str(run_dir))
    longer = f"quickstart --resume {run} {extension(config.train, step=state.step, seconds=state.seconds)}"
    if line := few_tokens(config, dataset, state, longer):
        say_wrapped(console, line)
    commands = [
        generate_command(run_dir, prompt, config.model),
        f"evaluate {run}",
        'train quickstart --pattern "swa swa swa mla" --run_name swa-swa-swa-mla',
    ]
    has = f"{run_dir} has config.json, metrics.jsonl, loss.png, samples.txt and the checkpoints."
    say_next(console, has, commands)


def _announcement(config: RunConfig, run_dir: Path) -> str:
    steps, minutes = config.train.steps, config.train.max_minutes
    limits = [f"{steps} steps"] if steps else []
    limits += [f"{minutes:g} minutes"] if minutes else []
    return f"training a small hybrid model on {config.data.source}, at most {' or '.join(limits)}, in {run_dir}"


def _compare(console: Console, name: str, bits_per_byte: float, held_out: bytes) -> None:
    """Compare the model with two compressors, which have seen no other text, on the same bytes."""
    compressed = {
        "gzip -9": len(gzip.compress(held_out, 9)),
        "xz -9e": len(lzma.compress(held_out, preset=9 | lzma.PRESET_EXTREME)),
    }
    table = Table()
    table.add_column("")
    table.add_column("bits per byte", justify="right")
    for compressor, size in compressed.items():
        table.add_row(compressor, f"{8 * size / len(held_out):.3f}")
    table.add_row(f"[bold]{name}", f"[bold]{bits_per_byte:.3f}")
    # Not a table title, which would wrap at the table's width.
    say(console, f"{len(held_out):,} bytes of held-out text")
    console.print(table)
