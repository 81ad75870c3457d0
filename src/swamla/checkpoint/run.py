"""Find a checkpoint of a run, and load its model."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from swamla import distributed
from swamla.checkpoint.folder import (
    Checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    require_format,
    step_name,
    step_of,
)
from swamla.errors import CorruptError, UsageError
from swamla.files import entry, read_json
from swamla.tensor_file import misfits

if TYPE_CHECKING:
    from swamla.data.tokenizer import Tokenizer
    from swamla.model.language_model import LanguageModel


def find_checkpoint(run_dir: Path, which: str = "best") -> Checkpoint:
    """The checkpoint of a run: "best", "latest" or a step, e.g. "500".

    "best" is the one with the lowest held-out loss; if none was evaluated, or with a warning if the best is damaged,
    the latest. Raises `UsageError` if there is none.
    """
    directory = run_dir / "checkpoints"
    if which not in ("best", "latest") and not which.isdigit():
        raise UsageError(f'checkpoint {which!r}: must be "best", "latest" or a step, e.g. "500"')
    if which.isdigit():
        path = directory / step_name(int(which))
        if not path.is_dir():
            have = ", ".join(str(step_of(p)) for p in list_checkpoints(directory)) or "none"
            raise UsageError(f"{run_dir}: no checkpoint of step {which}; there are: {have}")
        return load_checkpoint(path)
    if which == "best":
        try:
            if (step := best_step(directory)) is not None:
                return load_checkpoint(directory / step_name(step))
        except CorruptError as error:
            warnings.warn(f"the best checkpoint is damaged, using the latest: {error}", stacklevel=2)
    latest = latest_checkpoint(directory)
    if latest is None:
        raise UsageError(f"{run_dir}: has no checkpoint (looked in {directory})")
    return latest


def best_step(directory: Path) -> int | None:
    """The step in best.json, None without the file. Raises `CorruptError` if it is damaged."""
    best = directory / "best.json"
    return entry(read_json(best, inside=directory), "step", int, file=best) if best.exists() else None


def load(run_dir: str | Path, which: str = "best", *, raw: bool = False) -> "tuple[LanguageModel, Tokenizer]":
    """Rebuild the model of a run, in evaluation mode and fp32, and its tokenizer. Exported as `swamla.load`.

    which: "best" (lowest held-out loss), "latest", or a step such as "500". Of a run with `ema` these are the
    averaged weights, which its evaluations score; raw: the unaveraged ones. Only safetensors and JSON are ever read.
    The model generates only ids that the tokenizer has, even if the vocabulary is padded. Raises `UsageError` for a
    folder that is no run, `CorruptError` for a damaged one.
    """
    run_dir = Path(run_dir)
    plain = read_run_config(run_dir)
    checkpoint = find_checkpoint(run_dir, str(which))

    from swamla.config import from_plain
    from swamla.data.tokenizer import load_tokenizer
    from swamla.model.language_model import LanguageModelConfig

    config = from_plain(LanguageModelConfig, plain["model"], path="model", origin=str(run_dir / "config.json"))
    model = config.with_backends(stored_paths(checkpoint)).build()
    if checkpoint.has("ema") and not raw:
        weights = dict(model.named_parameters(remove_duplicate=False)).keys()
        if checkpoint.reader("ema").shapes().keys() != weights:
            raise CorruptError(f"{checkpoint.path}: the averaged weights do not fit the model")
    load_into(model, weights_of(checkpoint, raw=raw), origin=str(checkpoint.path))
    tokenizer = load_tokenizer(run_dir / "tokenizer.json")
    if tokenizer.vocab_size > config.vocab_size:
        raise CorruptError(
            f"{run_dir / 'tokenizer.json'}: has {tokenizer.vocab_size} ids, the model {config.vocab_size}: it is "
            "another run's"
        )
    model.known_ids = tokenizer.vocab_size
    return model.eval(), tokenizer


def stored_paths(checkpoint: Checkpoint) -> dict[str, str]:
    """Block → the backend that its mixer was trained with, if it was chosen by measurement on a CPU.

    Another backend would give other bits. Raises `CorruptError` if the entry is damaged.
    """
    paths = checkpoint.state.get("paths", {})
    if not isinstance(paths, dict) or not all(isinstance(backend, str) for backend in paths.values()):
        raise CorruptError(
            f'{checkpoint.path / "state.json"}: damaged: "paths" is {paths!r}, expected names of backends'
        )
    return paths


def weights_of(checkpoint: Checkpoint, *, raw: bool = False) -> dict[str, Tensor]:
    """Weights and buffers, with the averaged weights if there are any, unless `raw`."""
    tensors = checkpoint.tensors("model")
    return tensors if raw or not checkpoint.has("ema") else tensors | checkpoint.tensors("ema")


def read_run_config(run_dir: Path) -> dict[str, Any]:
    """The plain config of a run.

    Raises `UsageError` when `run_dir` is not a run folder or is from a newer swamla, `CorruptError` for a damaged one.
    """
    file = run_dir / "config.json"
    if run_dir.is_file():
        raise UsageError(
            f"{run_dir}: is a file; give the run folder (pickles are never loaded, only safetensors and JSON)"
        )
    if not file.exists():
        raise UsageError(f"{run_dir}: not a run folder (it has no config.json)")
    plain = read_json(file, inside=run_dir)
    require_format(plain, file)
    for part in ("model", "data", "train"):
        entry(plain, part, dict, file=file)
    return plain


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], *, origin: str) -> None:
    """Copy `tensors` into the parameters and buffers of `module`; the names must be the same.

    Raises `CorruptError` listing the first five names that are missing, unexpected or of another shape.
    """
    expected = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    got = {name: tuple(t.shape) for name, t in tensors.items()}
    if wrong := misfits(got, expected):
        raise CorruptError(f"{origin}: weights do not fit the model: {wrong}")
    with torch.no_grad():
        for name, own in module.state_dict().items():
            distributed.local(own).copy_(distributed.shard_like(tensors[name], own))
