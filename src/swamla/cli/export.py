"""`swamla export RUN OUT`: a trained model in a form that other programs load, or as a run with rounded weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from swamla.checkpoint import find_checkpoint, load, quantize, save_quantized
from swamla.checkpoint.run import read_run_config, weights_of
from swamla.cli.console import Console, program, say, say_wrapped
from swamla.cli.flags import argument, parse
from swamla.cli.roundings import rounded_copy
from swamla.cli.running import checked, run_folder
from swamla.cli.scoring import Scoring, other_data, own_data, run_config
from swamla.errors import UsageError
from swamla.interop import save_gguf, save_pretrained
from swamla.interop.gguf.saving import Type


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write a trained model and its tokenizer for other programs: as a folder of transformers or a file of llama.cpp.
    With --quantize as a run of ours.

    run: the run's folder.
    out: where to write: a missing or empty folder, or a file whose name ends in .gguf.
    to: an architecture of transformers that equals the model, e.g. llama or mistral; swamla: our own, which has every
        model and needs swamla where it is loaded; auto for the first that equals it, else swamla. A GGUF file has no
        such last resort: without an architecture that llama.cpp has too, the reason is told.
    gguf_type: dtype of the matrices in a GGUF file: f32, f16, bf16 or q8_0.
    checkpoint: best, latest, or a step.
    quantize: a run without training state, for all commands of swamla, with weights of 8 or 4 bits: int8 or int4.
    max_loss: refuse, and write nothing, if rounding adds more than this to the bits per byte of held-out text.
    data: score all of this data instead of the run's held-out text.
    """

    run: str = argument(positional=True)
    out: str = argument(positional=True)
    to: str = "auto"
    gguf_type: Type = "f16"
    checkpoint: str = "best"
    quantize: Literal["none", "int8", "int4"] = argument("none", group="quantize")
    max_loss: float | None = argument(None, group="quantize")
    data: str = argument("", group="quantize")


def main(argv: list[str]) -> int:
    """Load and write."""
    arguments, given = parse(Arguments, argv, command="swamla export")
    out = checked(arguments.out)
    as_gguf = out.suffix == ".gguf"
    if arguments.to == "gguf" and not as_gguf:
        raise UsageError(f"--to gguf: {out} must end in .gguf")
    run = run_folder(arguments.run)
    if arguments.quantize != "none":
        if other := sorted(given.keys() & {"to", "gguf_type"}):
            raise UsageError(f"--{other[0]} and --quantize exclude each other: the latter writes a run of swamla")
        if as_gguf:
            raise UsageError(f"--quantize {arguments.quantize} writes a run's folder, not {out}: --gguf_type q8_0")
        _write_rounded(run, out, arguments)
        return 0
    if alone := sorted(given.keys() & {"max_loss", "data"}):
        raise UsageError(f"--{alone[0]} needs --quantize, e.g. --quantize int8")
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


def _write_rounded(run: Path, out: Path, arguments: Arguments) -> None:
    """Round, score before and after, and write unless that costs more than --max_loss."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: exists and is not empty: choose another folder")
    checkpoint, config = find_checkpoint(run, arguments.checkpoint), run_config(run)
    model, _ = load(run, str(checkpoint.step))
    format, console = arguments.quantize, Console()
    weights = quantize(weights_of(checkpoint), model.config, format)
    if arguments.data:
        dataset = other_data(arguments.data, run, config, {}, {}, held_out=False)
    else:
        dataset = own_data(run, config, checkpoint)
    scoring = Scoring.of(dataset, config, checkpoint, model)
    scoring.announce()
    before = scoring.bits_per_byte(model)
    after = scoring.bits_per_byte(rounded_copy(model, weights, format))
    loss = after - before
    say(console, f"bits per byte {before:.4f} before, {after:.4f} in {format} ({loss:+.4f})")
    if arguments.max_loss is not None and not loss <= arguments.max_loss:
        raise UsageError(
            f"--max_loss {arguments.max_loss}: {format} adds {loss:.4f} bits per byte; {out} was not written"
        )
    file = save_quantized(run, out, checkpoint, weights, format)
    say(console, f"{out}: {format}, {file.stat().st_size / 1e6:.2f} MB")
    say_wrapped(console, f"next: {program()} generate {out}, {program()} evaluate {out}")
