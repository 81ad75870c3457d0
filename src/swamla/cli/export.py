"""`swamla export RUN OUT`: a trained model in a form that other programs load, or as a run with rounded weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from swamla.checkpoint import Checkpoint, find_checkpoint, load, quantize, save_quantized
from swamla.checkpoint.run import read_run_config, weights_of
from swamla.cli.console import Console, program, say, say_wrapped
from swamla.cli.flags import argument, parse
from swamla.cli.roundings import rounded_copy
from swamla.cli.running import checked, run_folder
from swamla.cli.scoring import Scoring, run_config, scored_data
from swamla.errors import UsageError
from swamla.interop import save_gguf, save_onnx, save_pretrained
from swamla.interop.gguf.saving import Type
from swamla.model.language_model import LanguageModel
from swamla.ops.rounding import Rounded


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write a trained model and its tokenizer for other programs: as a folder of transformers, a file of llama.cpp or a
    graph of ONNX; with --quantize as a run of ours.

    run: the run's folder.
    out: where to write: a missing or empty folder, or a file whose name ends in .gguf or .onnx.
    to: an architecture of transformers that equals the model, e.g. llama or mistral; swamla: our own, which has every
        model and needs swamla where it is loaded; auto for the first that equals it, else swamla. A GGUF file has no
        such last resort: without an architecture that llama.cpp has too, the reason is told.
    gguf_type: dtype of the matrices in a GGUF file: f32, f16, bf16 or q8_0.
    checkpoint: best, latest, or a step.
    one_token: a file of ONNX that takes one token at a time and needs no more than opset 20; otherwise, with gdn or
        kda, opset 27.
    quantize: weights of 8 or 4 bits, int8 or int4: in a run without training state, for all commands of swamla, or in a
        file of ONNX.
    max_loss: refuse, and write nothing, if rounding adds more than this to the bits per byte of held-out text; of a run
        on conversations or a task, to the nats per label of held-out answers.
    data: score all of this data instead of the run's held-out text or answers.
    """

    run: str = argument(positional=True)
    out: str = argument(positional=True)
    to: str = "auto"
    gguf_type: Type = "f16"
    checkpoint: str = "best"
    one_token: bool = argument(False, switch=True)
    quantize: Literal["none", "int8", "int4"] = argument("none", group="quantize")
    max_loss: float | None = argument(None, group="quantize")
    data: str = argument("", group="quantize")


def main(argv: list[str]) -> int:
    """Load and write."""
    arguments, given = parse(Arguments, argv, command="swamla export")
    out = checked(arguments.out)
    run, kind = run_folder(arguments.run), out.suffix if out.suffix in (".gguf", ".onnx") else "folder"
    _refuse(arguments, given, out, kind)
    length = read_run_config(run)["train"]["block_size"]  # says what it is if it is no run
    checkpoint = find_checkpoint(run, arguments.checkpoint)
    model, tokenizer = load(run, str(checkpoint.step))
    rounded = None if arguments.quantize == "none" else _rounded(run, checkpoint, model, arguments)
    if kind == ".onnx":
        opset = save_onnx(model, out, tokenizer=tokenizer, rounded=rounded, one_token=arguments.one_token)
        say(Console(), f"{out}: ONNX, opset {opset}, {_size(out)}")
    elif rounded is not None:
        file = save_quantized(run, out, checkpoint, rounded, arguments.quantize)
        say(Console(), f"{out}: {arguments.quantize}, {_size(file)}")
        say_wrapped(Console(), f"next: {program()} generate {out}, {program()} evaluate {out}")
    elif kind == ".gguf":
        to = "auto" if arguments.to == "gguf" else arguments.to
        weights = arguments.gguf_type
        home = save_gguf(model, out, tokenizer=tokenizer, to=to, weights=weights, trained_length=length)
        say(Console(), f"{out} is {home.name} of llama.cpp: {_size(out)}, {weights}")
    else:
        written = save_pretrained(model, out, to=arguments.to, tokenizer=tokenizer, trained_length=length)
        files = ", ".join(sorted(path.name for path in out.iterdir()))
        say(Console(), f"{out} is {written.kind} ({written.class_name}) of transformers: {files}")
        if written.has_every_model:
            say(Console(), "Load it after `import swamla.interop.transformers`, or with trust_remote_code=True.")
    return 0


def _refuse(arguments: Arguments, given: Mapping[str, Any], out: Path, kind: str) -> None:
    """Raise `UsageError` for flags that exclude each other or are for another kind of output."""
    if arguments.to == "gguf" and kind != ".gguf":
        raise UsageError(f"--to gguf: {out} must end in .gguf")
    if arguments.quantize == "none" and (alone := sorted(given.keys() & {"max_loss", "data"})):
        raise UsageError(f"--{alone[0]} needs --quantize, e.g. --quantize int8")
    if arguments.quantize != "none" and kind == ".gguf":
        raise UsageError(f"--quantize {arguments.quantize} is for a run's folder or ONNX, not {out}: --gguf_type q8_0")
    if "one_token" in given and kind != ".onnx":
        raise UsageError(f"--one_token is for ONNX: {out} must end in .onnx")
    others = {"to", "gguf_type"} if kind == ".onnx" or arguments.quantize != "none" else set()
    if other := sorted(given.keys() & others):
        what = f"{out} is ONNX" if kind == ".onnx" else f"with --quantize {arguments.quantize} {out} is a run of swamla"
        raise UsageError(f"--{other[0]} {given[other[0]]} is for other outputs: {what}")


def _rounded(
    run: Path, checkpoint: Checkpoint, model: LanguageModel, arguments: Arguments
) -> dict[str, Tensor | Rounded]:
    """The weights rounded, scored before and after. Raises `UsageError` if that costs more than --max_loss."""
    out, format, config = Path(arguments.out), arguments.quantize, run_config(run)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: exists and is not empty: choose another name")
    weights = quantize(weights_of(checkpoint), model.config, format)
    scoring = Scoring.of(scored_data(arguments.data, run, config, checkpoint, {}, {}), config, checkpoint, model)
    scoring.announce()
    before, after = (scoring.score(each)[scoring.figure] for each in (model, rounded_copy(model, weights, format)))
    loss = after - before
    say(Console(), f"{scoring.unit} {before:.4f} before, {after:.4f} in {format} ({loss:+.4f})")
    if arguments.max_loss is not None and not loss <= arguments.max_loss:
        raise UsageError(
            f"--max_loss {arguments.max_loss}: {format} adds {loss:.4f} {scoring.unit}; {out} was not written"
        )
    return weights


def _size(file: Path) -> str:
    return f"{file.stat().st_size / 1e6:.2f} MB"
