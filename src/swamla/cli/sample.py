"""`swamla sample RUN RUN … --prompt TEXT`: the texts of several models side by side."""

from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from swamla.checkpoint import load
from swamla.cli.console import Console, harmless
from swamla.cli.flags import argument, parse
from swamla.cli.generate import rounded_decoding, sampling_of
from swamla.cli.running import run_folder
from swamla.errors import UsageError
from swamla.inference.sampling import Sampling
from swamla.text import encode_prompt, generate_text, room


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Continue the same prompts by several models, with the same seeds, and show the texts side by side.

    run: the runs' folders.
    prompt: the text to continue, once per prompt; without one, a new document begins.
    samples: texts for each prompt, of the seeds seed, seed + 1 …
    max_new_tokens: stop after this many tokens, or where the model ends the document.
    temperature: below 1 more certain, above 1 more varied, 0 the same as --greedy.
    top_k: sample from the k likeliest tokens only; 0 for all.
    top_p: sample from the likeliest tokens that together have this probability.
    seed: the first one.
    greedy: always take the likeliest token.
    checkpoint: best, latest, or a step.
    """

    run: tuple[str, ...] = argument(annotation=str, positional=True, repeated=True)
    prompt: tuple[str, ...] = argument((), annotation=str, repeated=True)
    samples: int = 1
    max_new_tokens: int = 60
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    greedy: bool = False
    checkpoint: str = "best"


def main(argv: list[str]) -> int:
    """Generate and print."""
    arguments, given = parse(Arguments, argv, command="swamla sample")
    sampling = sampling_of(arguments, given)
    for name in ("samples", "max_new_tokens"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name} {getattr(arguments, name)}: must be > 0, e.g. 3")
    folders = [run_folder(run) for run in arguments.run]
    prompts = arguments.prompt or ("",)
    columns = [texts(folder, prompts, arguments, sampling) for folder in folders]
    table = Table(show_lines=True, expand=True, title_justify="left", header_style="")
    table.add_column("prompt, seed", ratio=1)
    for run in arguments.run:
        table.add_column(Text(run), ratio=2)
    for row, (prompt, seed) in enumerate(
        (prompt, arguments.seed + sample) for prompt in prompts for sample in range(arguments.samples)
    ):
        head = Text(f"{harmless(prompt) or '(new document)'}\n{seed}")
        table.add_row(head, *(Text(harmless(column[row])) for column in columns))
    Console().print(table)
    return 0


def texts(folder: Path, prompts: tuple[str, ...], arguments: Arguments, sampling: Sampling) -> list[str]:
    """One model's continuations: all samples of the first prompt, then of the next."""
    model, tokenizer = load(folder, arguments.checkpoint)
    decoding = rounded_decoding(model, arguments.samples)
    found = []
    for prompt in prompts:
        fitting = room(model, [encode_prompt(tokenizer, prompt)])
        count = arguments.max_new_tokens if fitting is None else min(arguments.max_new_tokens, fitting)
        done = generate_text(
            model, tokenizer, [prompt] * arguments.samples, count, sampling=sampling, decoding=decoding
        )
        found += [completion.text for completion in done.completions]
    return found
