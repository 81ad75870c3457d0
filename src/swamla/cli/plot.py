"""`swamla plot RUN …`: curves of several runs in one picture."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from swamla.cli.console import Console, say
from swamla.cli.flags import argument, parse
from swamla.cli.running import checked, run_folder
from swamla.config import did_you_mean
from swamla.data.caching import held_out_hash, short_source
from swamla.data.tokenizer import load_tokenizer
from swamla.errors import UsageError
from swamla.model.accounting import training_flops_per_token
from swamla.train.changes import config_of
from swamla.train.plot import IN_NATS, Curve, plot_runs, read_curve
from swamla.train.run_folder import identity_of_run
from swamla.train.tracking.metrics import read_metrics


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Draw training curves, raw ones faint and smoothed ones strong, with evaluations as marks.

    runs: folders of runs, or their names under runs/.
    output: the picture: .png, .pdf or .svg.
    x: the horizontal axis; flops takes each row as one document.
    y: the vertical axis: loss, held_out_loss, bits_per_byte, lr, grad_norm, or another name in metrics.jsonl; by
        default loss, or bits_per_byte if the runs have different tokenizers.
    """

    runs: tuple[str, ...] = argument(annotation=str, positional=True, repeated=True)
    output: str = argument("curves.png", short="o", metavar="FILE")
    x: Literal["step", "tokens", "flops", "time"] = "step"
    y: str = ""


@dataclass(frozen=True, kw_only=True)
class Text:
    """What a run's losses are of. tokenizer: its fingerprint, None if unknown.

    held_out: marks of its held-out text, of which equal texts share one; empty if unknown.
    """

    data: str = ""
    spec: str = ""
    tokenizer: str | None = None
    held_out: frozenset[Any] = frozenset()


def main(argv: list[str]) -> int:
    """Draw, and print the file's name."""
    arguments, _ = parse(Arguments, argv, command="swamla plot")
    picture = _picture(arguments.output)
    if not arguments.runs:
        raise UsageError("RUNS is missing: swamla plot RUN … draws them; swamla runs lists them")
    folders = [_folder(name) for name in arguments.runs]
    texts = [_text_of(folder) for folder in folders]
    y = _axis(arguments.y, texts)
    note = _note(texts) if y in IN_NATS or "bits_per_byte" in y else ""
    labels = _labels(folders, texts, told=bool(note) or _has_several_tokenizers(texts))
    curves = _curves(labels, folders, arguments.x, y)
    plot_runs(curves, picture, x=arguments.x, y=y, note=note)
    say(Console(), f"{picture}: {y} of {', '.join(curve.name for curve in curves)}")
    if note:
        say(Console(), f"note: {note}")
    return 0


def _picture(output: str) -> Path:
    """The file to draw to. Raises `UsageError` for another kind of file, or a missing folder."""
    picture = checked(output)
    if picture.suffix not in (".png", ".pdf", ".svg"):
        raise UsageError(f"--output {picture}: must end in .png, .pdf or .svg")
    if not picture.parent.is_dir():
        raise UsageError(f"--output {picture}: there is no folder {picture.parent}")
    return picture


def _has_several_tokenizers(texts: list[Text]) -> bool:
    return len({text.tokenizer for text in texts if text.tokenizer}) > 1


def _axis(given: str, texts: list[Text]) -> str:
    """The vertical axis. Raises `UsageError` for nats per token of runs whose tokens are different ones."""
    if not _has_several_tokenizers(texts):
        return given or "loss"
    if given in IN_NATS:
        tokenizers = ", ".join(dict.fromkeys(f"{text.spec} on {text.data}" for text in texts if text.tokenizer))
        raise UsageError(
            f"--y {given}: the runs have different tokenizers ({tokenizers}), and nats per token of different tokens "
            "cannot be compared: --y bits_per_byte"
        )
    return given or "bits_per_byte"


def _curves(labels: list[str], folders: list[Path], x: str, y: str) -> list[Curve]:
    """The curves of all runs. Raises `UsageError` if one of them has none."""
    records = [read_metrics(folder / "metrics.jsonl") for folder in folders]
    curves = [
        read_curve(label, found, x=x, y=y, flops_per_token=_flops(folder) if x == "flops" else math.nan)
        for label, folder, found in zip(labels, folders, records, strict=True)
    ]
    if not any(curve.training or curve.held_out or curve.lost for curve in curves):
        raise UsageError(f"--y {y}: no run has it; {_suggest(y, records)}")
    for curve in curves:
        if not curve.training and not curve.held_out:
            what = "only values that are not finite" if curve.lost else "none"
            raise UsageError(f"--y {y}: {curve.name} has {what}; leave that run out")
    return curves


def _text_of(folder: Path) -> Text:
    """What a run was trained and evaluated on, as far as its folder and the cache tell."""
    if not (folder / "config.json").is_file():
        return Text()
    config, file = config_of(folder).data, folder / "tokenizer.json"
    known = [each["fingerprint"] for each in identity_of_run(folder) or []]
    hashes = [held_out_hash(config.cache, fingerprint) for fingerprint in known]
    marks: set[Any] = {("data", *known)} if known else set()
    marks |= {("text", *hashes)} if hashes and all(hashes) else set()
    return Text(
        data=" + ".join(short_source(part.source) for part in config.sources),
        spec=short_source(config.tokenizer),
        tokenizer=load_tokenizer(file).fingerprint if file.is_file() else None,
        held_out=frozenset(marks),
    )


def _note(texts: list[Text]) -> str:
    """What to know of a comparison of losses: that the runs have different texts, or may have; else ""."""
    known = [text for text in texts if text.held_out]
    if all(text.held_out & known[0].held_out for text in known):
        return ""
    sure = all(any(mark[0] == "text" for mark in text.held_out) for text in known)
    of = "are of different texts" if sure else "may be of different texts (the cache no longer has them)"
    return f"the runs {of}, so their losses do not show which model is better"


def _labels(folders: list[Path], texts: list[Text], *, told: bool) -> list[str]:
    """Names for the legend, with the data and the tokenizer if these have to be told apart."""
    names = distinct_names(folders)
    if not told:
        return names
    return [
        f"{name} ({text.data}, {text.spec})" if text.data else name for name, text in zip(names, texts, strict=True)
    ]


def _flops(folder: Path) -> float:
    """Training FLOPs per token of a run. Raises as `config_of` does."""
    config = config_of(folder)
    return training_flops_per_token(config.model, config.train.block_size)


def _folder(name: str) -> Path:
    """The folder of a run that has metrics."""
    folder = run_folder(name)
    if not (folder / "metrics.jsonl").is_file():
        raise UsageError(
            f"{folder}: no run (it has no metrics.jsonl), nor is there one in runs/; swamla runs lists them"
        )
    return folder


def distinct_names(folders: list[Path]) -> list[str]:
    """Distinct names for the legend: the folders' names, with their parents' if two are the same."""
    names = [folder.resolve().name for folder in folders]
    alone = len(set(names)) == len(names)
    return names if alone else ["/".join(folder.resolve().parts[-2:]) for folder in folders]


def _suggest(y: str, records: list[list[dict[str, Any]]]) -> str:
    numbers = {key for found in records for record in found for key, value in record.items() if value is not None}
    return did_you_mean(y, sorted(numbers - {"step"}))
