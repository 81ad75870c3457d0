"""`swamla import FOLDER RUN`: a model of transformers as a run of ours, without training state."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from swamla.checkpoint.folder import FORMAT_VERSION, save_checkpoint
from swamla.cli.console import Console, say
from swamla.cli.flags import argument, parse
from swamla.cli.running import checked
from swamla.config import to_plain
from swamla.data.config import TOKEN_IDS, DataConfig
from swamla.data.tokenizer import IdTokenizer, Tokenizer, load_tokenizer
from swamla.errors import UsageError
from swamla.files import write_text_atomically
from swamla.interop import Architecture, read_architecture
from swamla.interop.folder import read_weights
from swamla.interop.tokenizer import OWN_FILE
from swamla.model.accounting import count_parameters
from swamla.train.config import RunConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Make a run of a folder that transformers saved: to evaluate, to generate with, to train on (--init_from).

    The run has the model, its tokenizer and one checkpoint of weights, in the folder's dtype. It cannot be resumed.
    folder: with config.json, *.safetensors and, for text, tokenizer.json.
    run: the new run's folder, missing or empty.
    """

    folder: str = argument(positional=True)
    run: str = argument(positional=True)


def main(argv: list[str]) -> int:
    """Read and write."""
    arguments, _ = parse(Arguments, argv, command="swamla import")
    source, run = checked(arguments.folder), checked(arguments.run)
    architecture, tokenizer = import_folder(source, run)
    model = architecture.language_model()
    layers, parameters = " ".join(model.pattern), count_parameters(model).total
    say(Console(), f"{run}: {architecture.kind}, layers {layers}, {parameters:,} parameters")
    if isinstance(tokenizer, IdTokenizer):
        say(Console(), f'{source} has no tokenizer.json: the run\'s texts are ids, as in " 17 5 23"')
    further = f"swamla evaluate {run} --data FILE, swamla train --init_from {run} --data FILE"
    say(Console(), f"next: swamla generate {run}, {further}")
    return 0


def import_folder(source: Path, run: Path) -> tuple[Architecture, Tokenizer]:
    """Write the run; returns what was read. Raises `UsageError` for a folder that is not empty, and as reading does."""
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise UsageError(f"{run}: exists and is not empty: choose another folder")
    if not source.is_dir():
        raise UsageError(
            f"{source}: {'a file' if source.exists() else 'no such folder'}: must be a folder of transformers"
        )
    if (source / "checkpoints").is_dir():
        raise UsageError(f"{source}: a run already: generate, evaluate, export and train --init_from take it as it is")
    architecture = read_architecture(source)
    model = architecture.language_model()
    tokenizer = tokenizer_of(source, model.vocab_size)
    weights = dict(read_weights(source, architecture))
    if model.tied_head:
        weights["head.weight"] = weights["embedding.weight"]
    data = DataConfig(source=TOKEN_IDS, tokenizer=f"ids:{model.vocab_size - 1}", held_out_fraction=1.0)
    config = RunConfig(model=model, data=data, train=TrainConfig(steps=1))
    run.mkdir(parents=True, exist_ok=True)
    try:
        save_checkpoint(run / "checkpoints", 0, tensors={"model": weights}, state={"weights_only": True})
        tokenizer.save(run / "tokenizer.json")
        plain = {"format_version": FORMAT_VERSION, **to_plain(config)}
        write_text_atomically(
            run / "config.json", json.dumps(plain, indent=2) + "\n"
        )  # last: it makes the folder a run
    except BaseException:
        shutil.rmtree(run, ignore_errors=True)
        raise
    return architecture, tokenizer


def tokenizer_of(folder: Path, vocab_size: int) -> Tokenizer:
    """The folder's tokenizer; ids where it has none.

    Raises `UsageError` for one that is a SentencePiece file only, or has more ids than the model.
    """
    for name in (OWN_FILE, "tokenizer.json"):
        if (folder / name).is_file():
            tokenizer = load_tokenizer(folder / name)
            if tokenizer.vocab_size > vocab_size:
                raise UsageError(f"{folder / name}: has {tokenizer.vocab_size} ids, the model {vocab_size}")
            return tokenizer
    if (folder / "tokenizer.model").is_file():
        raise UsageError(
            f"{folder}: has tokenizer.model, which is not read, and no tokenizer.json: save it once by transformers' "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    return IdTokenizer(vocab_size - 1)
