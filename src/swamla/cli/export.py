"""`swamla export RUN OUT`: a trained model in a form that other programs load."""

from dataclasses import dataclass

from swamla.checkpoint import load
from swamla.checkpoint.run import read_run_config
from swamla.cli.console import Console, say
from swamla.cli.flags import argument, parse
from swamla.cli.running import checked, run_folder
from swamla.errors import UsageError
from swamla.interop import save_gguf, save_pretrained
from swamla.interop.gguf.saving import Type


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write a trained model and its tokenizer for other programs: as a folder of transformers or a file of llama.cpp.

    run: the run's folder.
    out: where to write: a missing or empty folder, or a file whose name ends in .gguf.
    to: an architecture of transformers that equals the model, e.g. llama or mistral; swamla: our own, which has every
        model and needs swamla where it is loaded; auto for the first that equals it, else swamla. A GGUF file has no
        such last resort: without an architecture that llama.cpp has too, the reason is told.
    gguf_type: dtype of the matrices in a GGUF file: f32, f16, bf16 or q8_0.
    checkpoint: best, latest, or a step.
    """

    run: str = argument(positional=True)
    out: str = argument(positional=True)
    to: str = "auto"
    gguf_type: Type = "f16"
    checkpoint: str = "best"


def main(argv: list[str]) -> int:
    """Load and write."""
    arguments, _ = parse(Arguments, argv, command="swamla export")
    out = checked(arguments.out)
    as_gguf = out.suffix == ".gguf"
    if arguments.to == "gguf" and not as_gguf:
        raise UsageError(f"--to gguf: {out} must end in .gguf")
    run = run_folder(arguments.run)
    model, tokenizer = load(run, arguments.checkpoint)
    length = read_run_config(run)["train"]["block_size"]
    if as_gguf:
        to = "auto" if arguments.to == "gguf" else arguments.to
        home = save_gguf(model, out, tokenizer=tokenizer, to=to, weights=arguments.gguf_type, trained_length=length)
        say(Console(), f"{out} is {home.name} of llama.cpp: {out.stat().st_size / 1e6:.1f} MB, {arguments.gguf_type}")
        return 0
    written = save_pretrained(model, out, to=arguments.to, tokenizer=tokenizer, trained_length=length)
    files = ", ".join(sorted(path.name for path in out.iterdir()))
    say(Console(), f"{out} is {written.kind} ({written.class_name}) of transformers: {files}")
    if written.has_every_model:
        say(Console(), "Load it after `import swamla.interop.transformers`, or with trust_remote_code=True.")
    return 0
