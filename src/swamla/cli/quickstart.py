"""`swamla quickstart`: the shortest way to a trained hybrid model, and what it is worth."""

import gzip
import lzma
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from swamla.checkpoint import load
from swamla.cli.flags import parse
from swamla.cli.overrides import add_flags
from swamla.cli.run_config import read_recipe
from swamla.cli.running import new_folder, prepare_data, run_training, say, validation
from swamla.data.tokenizer import Tokenizer
from swamla.generate import generate_text
from swamla.model.language_model import LanguageModel
from swamla.train import RunConfig, TrainState
from swamla.train.precision import autocast

PROMPT = "def "
SAMPLE_TOKENS = 120


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train the recipe "quickstart", then weigh the model against gzip and xz on text it never saw."""

    output_dir: str = ""
    """The run's folder; by default runs/quickstart, numbered when that is taken."""


def main(argv: list[str]) -> int:
    """Train, sample, compare, and say what to try next."""
    arguments: Any
    arguments, given = parse(add_flags(Arguments), argv, command="quickstart")
    config = read_recipe("quickstart", arguments, given)
    run_dir = new_folder(arguments.output_dir, "quickstart")
    console = Console()
    say(console, _announcement(config, run_dir))
    dataset = prepare_data(config.data, console)
    samples: list[str] = []

    def first_sample(state: TrainState) -> None:
        samples.append(_sample(state.model, dataset.tokenizer))

    state = run_training(config, dataset, run_dir, console, on_start=first_sample)
    model, tokenizer = load(run_dir)
    model = model.to(state.device)
    samples.append(_sample(model, tokenizer))
    text = "\n\n".join(f"=== {when} training ===\n{s}" for when, s in zip(("before", "after"), samples, strict=True))
    (run_dir / "samples.txt").write_text(text + "\n", encoding="utf-8")
    say(console, f"\n{_harmless(text)}\n")
    with autocast(state.precision, state.device):
        found = validation(dataset, config.train.block_size)(model)
    _compare(console, run_dir.name, found["bits_per_byte"], dataset.held_out_text())
    _say_where_and_next(console, run_dir)
    return 0


def _announcement(config: RunConfig, run_dir: Path) -> str:
    train = config.train
    limits = [f"{train.steps} steps"] if train.steps else []
    limits += [f"{train.max_minutes:g} minutes"] if train.max_minutes else []
    stack = " ".join(config.model.pattern)
    return f"training a model of layers {stack} on {config.data.source}, at most {' or '.join(limits)}, in {run_dir}"


def _sample(model: LanguageModel, tokenizer: Tokenizer) -> str:
    model.eval()
    done = generate_text(model, tokenizer, [PROMPT], SAMPLE_TOKENS)
    return PROMPT + done.completions[0].text


def _harmless(text: str) -> str:
    """Text without control characters: an untrained model may say anything, and the terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _compare(console: Console, name: str, bits_per_byte: float, held_out: bytes) -> None:
    """The model beside two compressors, on the same bytes; these learn from nothing but the bytes themselves."""
    compressed = {
        "gzip -9": len(gzip.compress(held_out, 9)),
        "xz -9e": len(lzma.compress(held_out, preset=9 | lzma.PRESET_EXTREME)),
    }
    table = Table(title=f"{len(held_out):,} bytes of held-out text", title_justify="left")
    table.add_column("")
    table.add_column("bits per byte", justify="right")
    for compressor, size in compressed.items():
        table.add_row(compressor, f"{8 * size / len(held_out):.3f}")
    table.add_row(f"[bold]{name}", f"[bold]{bits_per_byte:.3f}")
    console.print(table)


def _say_where_and_next(console: Console, run_dir: Path) -> None:
    run, program = shlex.quote(str(run_dir)), _program()
    say(console, f"\n{run_dir} holds config.json, metrics.jsonl, loss.png, samples.txt and the checkpoints. Next:\n")
    say(console, f'  {program} generate {run} --prompt "class " --stats')
    say(console, f"  {program} evaluate {run}")
    say(console, f'  {program} train quickstart --pattern "swa swa swa mla" --run_name swa-swa-swa-mla')


def _program() -> str:
    """How this program was called, in a form that works again from this folder."""
    called = sys.argv[0]
    if os.path.basename(called) != "swamla":
        return f"{shlex.quote(os.path.relpath(sys.executable))} -m swamla"
    on_path = shutil.which("swamla")
    return "swamla" if on_path and os.path.samefile(on_path, called) else shlex.quote(os.path.relpath(called))
