"""Convert a checkpoint to a new run folder: with another number of shards, or the weights alone."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from swamla.checkpoint.folder import Checkpoint, mark_best, save_checkpoint
from swamla.checkpoint.run import best_step, find_checkpoint, read_run_config, weights_of
from swamla.checkpoint.shards import LocalTensors, Shard
from swamla.errors import UsageError
from swamla.files import regular_file

WeightType = Literal["fp32", "bf16", "fp16"]
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNSHARDED = ("rng",)  # groups that are never sharded


def convert_checkpoint(
    source: Path,
    folder: Path,
    *,
    which: str = "best",
    shards: int = 1,
    weights_only: bool = False,
    dtype: WeightType = "fp32",
) -> Checkpoint:
    """Write a checkpoint of the run `source` as the only one of the new run folder `folder`; returns the original.

    shards: files per group, sharded as by `fully_shard` on that many processes; 1 for a single file.
    weights_only: only the weights that `swamla.load` returns, averaged if there are averages; a run cannot resume from
    them. dtype: of the matrices, with weights_only; vectors stay in fp32: they are small, and routers' biases and decay
    rates need the precision. Raises `UsageError` for a folder that is not empty.
    """
    if shards < 1:
        raise UsageError(f"shards = {shards}: must be >= 1")
    if dtype != "fp32" and not weights_only:
        raise UsageError(f"dtype = {dtype} needs `weights_only`: a run cannot resume from rounded weights")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: exists and is not empty: choose another folder")
    read_run_config(source)
    checkpoint = find_checkpoint(source, which)
    groups, state = _groups(checkpoint, weights_only, TYPES[dtype]), dict(checkpoint.state)
    if weights_only:
        state["weights_only"] = True
    first, *others = [
        {group: _shard_of(named, rank, shards, group) for group, named in groups.items()} for rank in range(shards)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_checkpoint(folder / "checkpoints", checkpoint.step, tensors=first, others=others, state=state)
        if checkpoint.step == best_step(checkpoint.path.parent) and state.get("best_loss") is not None:
            mark_best(folder / "checkpoints", checkpoint.step, state["best_loss"])
        for name in ("tokenizer.json", "metrics.jsonl", "config.json"):  # config.json last: it makes the folder a run
            if (source / name).exists():
                shutil.copyfile(regular_file(source / name, inside=source), folder / name)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return checkpoint


def _groups(checkpoint: Checkpoint, weights_only: bool, dtype: torch.dtype) -> Mapping[str, Mapping[str, Tensor]]:
    if not weights_only:
        return {group: checkpoint.tensors(group) for group in checkpoint.groups()}
    done: dict[int, Tensor] = {}  # tied weights stay tied
    weights = weights_of(checkpoint)
    for tensor in weights.values():
        if id(tensor) not in done:
            done[id(tensor)] = tensor.to(dtype) if tensor.ndim > 1 and tensor.is_floating_point() else tensor
    return {"model": {name: done[id(tensor)] for name, tensor in weights.items()}}


def _shard_of(named: Mapping[str, Tensor], rank: int, shards: int, group: str) -> LocalTensors:
    if shards == 1 or group in UNSHARDED:
        return dict(named) if rank == 0 else {}
    cut: dict[str, Any] = {name: _shard(tensor, rank, shards) for name, tensor in named.items() if tensor.ndim}
    return cut | ({name: tensor for name, tensor in named.items() if not tensor.ndim} if rank == 0 else {})


def _shard(tensor: Tensor, rank: int, shards: int) -> Shard:
    length = len(tensor)
    size = -(-length // shards)
    begin = min(rank * size, length)
    part = tensor[begin : begin + size]
    return Shard(tensor=part, shape=tuple(tensor.shape), offset=(begin, *(0,) * (tensor.ndim - 1)))
