"""Checkpoints of rounded weights: which weights are rounded, their exact size, their file.

In the file `NAME` has the integers, `NAME_scale` the scales, and the header format and shape of each rounded weight.
Reading gives weights in fp32, so everything that reads a run reads these too.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swamla.checkpoint.folder import Checkpoint, save_checkpoint
from swamla.checkpoint.shards import QUANTIZED, SCALE
from swamla.errors import UsageError
from swamla.files import regular_file
from swamla.model.language_model import LanguageModelConfig
from swamla.ops.rounding import FORMATS, Rounded, rounded_bytes

COPIED = ("tokenizer.json", "data.json", "metrics.jsonl", "config.json")  # config.json last: it makes the folder a run

Weights = Mapping[str, Tensor | Rounded]


def formats_of(config: LanguageModelConfig, format: str) -> dict[str, str]:
    """Parameter → its format, of all that are rounded: matrices, not vectors, nor sets of them such as a router's.

    Int4 is for the matrices of the blocks; embeddings and the head are then int8. Raises `UsageError` for a name that
    is no format.
    """
    if format not in FORMATS:
        raise UsageError(f"quantize = {format!r}: must be one of {', '.join(FORMATS)}")
    return {
        name: format if name.startswith("blocks.") else "int8"
        for name, parameter in config.skeleton().named_parameters(remove_duplicate=False)
        if parameter.ndim > 1 and name not in config.vectors
    }


def quantized_bytes(config: LanguageModelConfig, format: str) -> int:
    """Bytes of all tensors of a quantized model, from the config alone; a tied head is stored once."""
    rounded, skeleton = formats_of(config, format), config.skeleton()
    tied = {"head.weight"} if config.tied_head else set()
    return sum(
        rounded_bytes(tuple(tensor.shape), rounded[name]) if name in rounded else 4 * tensor.numel()
        for name, tensor in skeleton.state_dict().items()
        if name not in tied
    )


def quantize(weights: Mapping[str, Tensor], config: LanguageModelConfig, format: str) -> dict[str, Tensor | Rounded]:
    """The weights of a model, rounded where `formats_of` says so, the others in fp32; a tied head stays one object.

    Raises `UsageError` for an unknown format, and for weights that are not finite.
    """
    formats = formats_of(config, format)
    done: dict[int, Tensor | Rounded] = {}
    for name, weight in weights.items():
        if id(weight) not in done:
            if not torch.isfinite(weight).all():
                raise UsageError(f"{name} has values that are not finite: it cannot be rounded")
            done[id(weight)] = Rounded.of(weight, formats[name]) if name in formats else weight.float()
    return {name: done[id(weight)] for name, weight in weights.items()}


def dequantized(weights: Weights) -> dict[str, Tensor]:
    """All weights in fp32, as the file of them is read."""
    return {name: weight.weight() if isinstance(weight, Rounded) else weight for name, weight in weights.items()}


def save_quantized(source: Path, folder: Path, checkpoint: Checkpoint, weights: Weights, format: str) -> Path:
    """Write rounded weights of a checkpoint of the run `source` as a run folder without training state.

    Returns the file of the weights. Raises `UsageError` for a folder that is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: exists and is not empty: choose another folder")
    tensors, metadata = _as_stored(weights)
    state = checkpoint.state | {"weights_only": True}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        path = save_checkpoint(
            folder / "checkpoints",
            checkpoint.step,
            tensors={"model": tensors},
            state={name: value for name, value in state.items() if name != "best_loss"},  # of other weights
            metadata={QUANTIZED: json.dumps({"format": format} | metadata)},
        )
        for name in COPIED:
            if (source / name).exists():
                shutil.copyfile(regular_file(source / name, inside=source), folder / name)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return path / "model.safetensors"


def _as_stored(weights: Weights) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the file, and what its header says of them."""
    tensors: dict[str, Tensor] = {}
    stored: dict[str, Any] = {}
    first: dict[int, str] = {}
    aliases = {}
    for name, weight in weights.items():
        if (known := first.setdefault(id(weight), name)) != name:
            aliases[name] = known
        elif isinstance(weight, Rounded):
            tensors |= {name: weight.integers, name + SCALE: weight.scale}
            stored[name] = {"format": weight.format, "shape": list(weight.shape)}
        else:
            tensors[name] = weight
    return tensors, {"weights": stored, "aliases": aliases}
