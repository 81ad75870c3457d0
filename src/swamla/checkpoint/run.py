"""Find a checkpoint of a run, and load its model: `swamla.load`."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from swamla.checkpoint.folder import (
    Checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_into,
    require_format,
    step_name,
    step_of,
    stored_paths,
)
from swamla.errors import CorruptError, UsageError
from swamla.files import entry, read_json

if TYPE_CHECKING:
    from swamla.data.tokenizer import Tokenizer
    from swamla.model.language_model import LanguageModel, LanguageModelConfig


def find_checkpoint(run_dir: Path, which: str = "best") -> Checkpoint:
    """The checkpoint of a run: "best", "latest" or a step, e.g. "500".

    "best" is the one with the lowest held-out loss, or the latest if none was evaluated or, with a warning, if the best
    is damaged. Raises `UsageError` if there is none.
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


def load(
    run_dir: str | Path,
    which: str = "best",
    *,
    raw: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> "tuple[LanguageModel, Tokenizer]":
    """Rebuild the model of a run, in evaluation mode, and its tokenizer. Exported as `swamla.load`.

    device, dtype: where the model is put, and its weights' dtype; by default the CPU, and fp32.
    which: "best" (lowest held-out loss), "latest", or a step such as "500". raw: not the averaged weights of a run with
    `ema`, which its evaluations score. Adapters are merged.
    Only safetensors and JSON are read. The model generates only ids of the
    tokenizer, even if the vocabulary is padded. Raises `UsageError` for a folder that is not a run, `CorruptError` for
    a damaged one.
    """
    if not isinstance(dtype, torch.dtype | None):
        raise UsageError(f"dtype is {dtype!r}: must be a dtype of torch, e.g. torch.bfloat16")
    run_dir = Path(run_dir)
    config = _model_config(run_dir)
    checkpoint = find_checkpoint(run_dir, str(which))

    from swamla.data.tokenizer import load_tokenizer

    model = config.with_backends(stored_paths(checkpoint)).build()
    if checkpoint.has("ema") and not raw:
        weights = dict(model.named_parameters(remove_duplicate=False)).keys()
        if checkpoint.reader("ema").shapes().keys() != weights:
            raise CorruptError(f"{checkpoint.path}: the averaged weights do not fit the model")
    load_into(model, weights_of(checkpoint, raw=raw), origin=str(checkpoint.path))
    tokenizer = load_tokenizer(run_dir / "tokenizer.json")
    if tokenizer.vocab_size > config.vocab_size:
        raise CorruptError(
            f"{run_dir / 'tokenizer.json'}: has {tokenizer.vocab_size} ids, the model {config.vocab_size}: it belongs "
            "to another run"
        )
    model.known_ids = tokenizer.vocab_size
    model.quantized = checkpoint.reader("model").quantized
    return model.eval().to(device=device, dtype=dtype), tokenizer


def weights_of(checkpoint: Checkpoint, *, raw: bool = False) -> dict[str, Tensor]:
    """Weights and buffers; the averaged weights replace the raw ones if there are any, unless `raw`.

    Adapters are merged. Their model's config is read from the run's folder.
    """
    tensors = checkpoint.tensors("model")
    if checkpoint.has("adapters"):
        from swamla.model.adapters import merged

        config = _model_config(checkpoint.path.parents[1])
        return merged(tensors, checkpoint.tensors("adapters"), config, origin=str(checkpoint.path))
    return tensors if raw or not checkpoint.has("ema") else tensors | checkpoint.tensors("ema")


def _model_config(run_dir: Path) -> "LanguageModelConfig":
    from swamla.config import from_plain
    from swamla.model.language_model import LanguageModelConfig

    plain = read_run_config(run_dir)["model"]
    return from_plain(LanguageModelConfig, plain, path="model", origin=str(run_dir / "config.json"))


def read_run_config(run_dir: Path) -> dict[str, Any]:
    """The config of a run as plain data.

    Raises `UsageError` if `run_dir` is not a run folder or is from a newer swamla, `CorruptError` for a damaged one.
    """
    file = run_dir / "config.json"
    if run_dir.is_file():
        raise UsageError(
            f"{run_dir}: is a file; give the run folder (pickles are never loaded, only safetensors and JSON)"
        )
    if not file.exists():
        why = (
            "it has no config.json"
            if run_dir.exists()
            else "there is no such folder; swamla runs lists what is in runs/"
        )
        raise UsageError(f"{run_dir}: not a run folder ({why})")
    plain = read_json(file, inside=run_dir)
    if "model_type" in plain:
        raise UsageError(f"{run_dir}: a model of transformers, not a run: swamla import {run_dir} RUN makes one of it")
    require_format(plain, file)
    for part in ("model", "data", "train"):
        entry(plain, part, dict, file=file)
    return plain
