"""Continued pretraining: a new run starts from the weights of another one, and takes nothing else from it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swamla.checkpoint import find_checkpoint, load_into, read_run_config
from swamla.checkpoint.run import weights_of
from swamla.config import from_plain
from swamla.data.tokenizer import Tokenizer, load_tokenizer
from swamla.errors import UsageError
from swamla.files import entry, read_json
from swamla.interop import load_pretrained, read_architecture
from swamla.interop.tokenizer import OWN_FILE
from swamla.model.language_model import LanguageModel, LanguageModelConfig
from swamla.tensor_file import misfits

RECORD = "initialized_from.json"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The source of initial weights: a run, one of its checkpoints, or a folder of transformers (`swamla export`).

    which: the checkpoint of the run.  model: the config of the weights.  tokenizer: its file, None if there is none.
    """

    folder: Path
    which: str
    is_run: bool
    model: LanguageModelConfig
    tokenizer: Path | None

    def require_fit(self, model: LanguageModelConfig, *, grown: bool = False) -> None:
        """Raise `UsageError` naming the first five weights that are missing or shaped differently in `model`.

        grown: `model` may have more ids.
        """
        if grown and model.vocab_size > self.model.vocab_size:
            model = replace(model, vocab_size=self.model.vocab_size)
        if wrong := misfits(_shapes(self.model), _shapes(model)):
            raise UsageError(f"init_from = {self.folder}: its weights do not fit this model: {wrong}")

    def require_same_vocabulary(self, tokenizer: Tokenizer, extended: Tokenizer) -> None:
        """Raise `UsageError` unless the weights were trained with `tokenizer`, or with what that adds ids to."""
        if self.tokenizer is None:
            return
        theirs = load_tokenizer(self.tokenizer)
        if theirs.fingerprint not in (tokenizer.fingerprint, extended.fingerprint):
            raise UsageError(
                f"init_from = {self.folder}: its weights were trained with another vocabulary ({theirs.vocab_size} "
                f"ids, fingerprint {theirs.fingerprint[:12]}) than the data's ({tokenizer.vocab_size} ids, "
                f"{tokenizer.fingerprint[:12]}): use tokenizer = {str(self.tokenizer)!r}"
            )

    def fill(self, model: LanguageModel, new_ids: range = range(0)) -> dict[str, Any]:
        """Load the weights into `model`, which may be sharded; returns a record of their source.

        new_ids: ids that the weights were not trained with. Their rows in the embedding, and in the head, are the mean
        of the rows before them, and so are rows that `model` has beyond the weights'.
        """
        if not self.is_run:
            own = load_pretrained(self.folder).state_dict()
            load_into(model, _grown(own, model, new_ids), origin=str(self.folder))
            return {"folder": str(self.folder), "weights": "exported"}
        checkpoint = find_checkpoint(self.folder, self.which)
        grows = bool(new_ids) or model.config.vocab_size > self.model.vocab_size
        if checkpoint.has("adapters"):
            weights: Mapping[str, Tensor] = weights_of(checkpoint)
        else:
            parameters = dict(model.named_parameters(remove_duplicate=False))
            like = {} if grows else parameters  # whole tables can be given rows, shards of them not
            weights = checkpoint.tensors("model", like=like.get)
            if checkpoint.has("ema"):  # which evaluations scored, and `swamla.load` returns
                weights = {**weights, **checkpoint.tensors("ema", like=like.get)}
        load_into(model, _grown(weights, model, new_ids), origin=str(checkpoint.path))
        return {
            "folder": str(self.folder),
            "checkpoint": self.which,
            "step": checkpoint.step,
            "weights": "averaged" if checkpoint.has("ema") else "as trained",
        }


def _grown(weights: Mapping[str, Tensor], model: LanguageModel, new_ids: range) -> dict[str, Tensor]:
    """The weights with the rows of new ids in the tables of ids; tied tables stay one tensor."""
    found, size = dict(weights), model.config.vocab_size
    done: dict[int, Tensor] = {}
    for name in ("embedding.weight", "head.weight"):
        old = weights[name]
        if not new_ids and size == len(old):
            continue
        if id(old) not in done:
            known = min(new_ids.start, len(old)) if new_ids else len(old)
            mean = old[:known].double().mean(dim=0).to(old.dtype)
            table = torch.cat([old, mean.expand(size - len(old), -1)])
            table[new_ids.start : new_ids.stop] = mean
            done[id(old)] = table
        found[name] = done[id(old)]
    return found


def origin_of(where: str, which: str = "best") -> Origin:
    """The source that `where` names: a run's folder, one of its checkpoints, or an exported folder.

    Raises `UsageError` if it is none of these, and as `read_run_config` does.
    """
    folder = Path(where).expanduser().resolve()
    checkpoint = folder.parent.name == "checkpoints" and (folder / "manifest.json").is_file()
    run = folder.parents[1] if checkpoint else folder
    exported = any(folder.glob("*.safetensors")) and not (folder / "checkpoints").is_dir() and not checkpoint
    if which != "best" and (checkpoint or exported):
        raise UsageError(f"init_checkpoint = {which!r}: chooses one of a run's checkpoints, and {folder} is none")
    if not folder.is_dir():
        raise UsageError(
            f"init_from = {where}: no such folder; give a run, one of its checkpoints, or an exported folder"
        )
    if exported:
        tokenizers = [file for name in (OWN_FILE, "tokenizer.json") if (file := folder / name).exists()]
        model, tokenizer = read_architecture(folder).language_model(), next(iter(tokenizers), None)
        return Origin(folder=folder, which="", is_run=False, model=model, tokenizer=tokenizer)
    plain = read_run_config(run)["model"]
    model = from_plain(LanguageModelConfig, plain, path="model", origin=str(run / "config.json"))
    which = folder.name.removeprefix("step-").lstrip("0") or "0" if checkpoint else which
    return Origin(folder=run, which=which, is_run=True, model=model, tokenizer=run / "tokenizer.json")


def lineage(run: Path) -> Iterator[Path]:
    """A run's folder, then the folder of the run that its weights came from, and so on, as far as they exist.

    Ends at an exported folder, which does not record its training data.
    """
    seen = set()
    while run.resolve() not in seen and (run / "checkpoints").is_dir():
        yield run
        seen.add(run.resolve())
        if not (run / RECORD).is_file():
            return
        run = Path(entry(read_json(run / RECORD, inside=run), "folder", str, file=run / RECORD))


def describe(record: Mapping[str, Any]) -> str:
    """The record that `Origin.fill` returned, as a line to print."""
    if "step" not in record:
        return f"weights from {record['folder']}, as exported"
    step, which = record["step"], record["checkpoint"]
    chosen = f"step {step}" if which.isdigit() else f"step {step} ({which})"
    return f"weights from {record['folder']}, {chosen}, {record['weights']}"


def _shapes(model: LanguageModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.skeleton().state_dict().items()}
