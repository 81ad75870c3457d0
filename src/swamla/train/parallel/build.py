"""Build a run's model with its initial weights under a data-parallel strategy."""

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from swamla import distributed
from swamla.errors import MissingBackendError, require
from swamla.model.language_model import LanguageModel, LanguageModelConfig
from swamla.ops.layout import Layout
from swamla.train.config import TrainConfig
from swamla.train.parallel.strategy import DDPStrategy, ExpertParallel, Found, FSDPStrategy, Strategy


def build_model(
    config: LanguageModelConfig, train: TrainConfig, device: torch.device, prepare: Callable[[LanguageModel], None]
) -> Strategy:
    """The model with the initial weights of `train.seed`, distributed over all ranks; on one process a plain model.

    train: says how (`parallel`, `shards`, `expert_parallel`).  prepare: called with the model before it is
    distributed; it may replace modules, but no parameters. Shards are filled block by block, so that no rank ever has
    more than one block's full parameters. Raises `ConfigError` if `shards` does not divide the ranks, or
    `expert_parallel` the ranks or the experts.
    """
    ranks, seed, expert_parallel = distributed.world_size(), train.seed, train.expert_parallel
    _require_device(device)
    fits = ranks % expert_parallel == 0
    require(fits, "train.expert_parallel", expert_parallel, f"must divide the number of processes, here {ranks}")
    if ranks == 1:
        model = config.build(seed).to(device)
        prepare(model)
        return Strategy(model)
    if train.parallel in ("auto", "ddp"):
        model = config.skeleton()
        prepare(model)
        experts = _fill(model, seed, device, expert_parallel)
        return replicated(model, experts)
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh, model = _mesh(train, device), config.skeleton()
    prepare(model)
    experts = _fill(
        model,
        seed,
        device,
        expert_parallel,
        lambda module, owned: fully_shard(module, mesh=mesh, ignored_params=set(owned)),
    )
    register_fsdp_forward_method(model, "loss")
    return FSDPStrategy(model, mesh, experts=experts)


def replicated(model: LanguageModel, experts: ExpertParallel | None = None) -> DDPStrategy:
    """The same model on every rank; gradients are averaged, of the parameters that have one from now on."""
    # Graphs are single blocks, so splitting them for buckets gains nothing.
    torch._dynamo.config.optimize_ddp = False
    # Without find_unused_parameters DDP rebuilds its buckets after a process's first step, and more than two ranks
    # then sum in another order: a resumed run would differ in the last bit from an uninterrupted one.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renamed the option, 2.11 has only this name
        wrapped = nn.parallel.DistributedDataParallel(
            _ignoring(experts, _Loss(model)),
            broadcast_buffers=False,
            find_unused_parameters=True,
            gradient_as_bucket_view=True,  # gradients are views of the buckets, not a second copy
        )
    return DDPStrategy(model, wrapped, experts=experts)


class _Loss(nn.Module):
    """The model's loss as a forward pass, for DDP to wrap."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model
        # Never used, so that DDP does not warn that find_unused_parameters found none.
        self.unused = nn.Parameter(torch.zeros((), device=model.device))

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor, seq: Layout) -> Found:
        return self.model.loss(tokens_BT, labels_BT, seq)


def _fill(
    model: LanguageModel,
    seed: int,
    device: torch.device,
    expert_parallel: int,
    shard: Callable[[nn.Module, list[nn.Parameter]], object] = lambda module, owned: None,
) -> ExpertParallel | None:
    """Initialise a skeleton block by block, and shard each block as soon as it is initialised.

    shard: called with every block, then with the model, each time with the expert parameters in it, which are sharded
    already. Returns these, None without expert parallelism.
    """
    mesh = _expert_mesh(expert_parallel, device) if expert_parallel > 1 else None
    owned: list[nn.Parameter] = []
    for index, block in enumerate(model.blocks):
        block.to_empty(device=device)
        model.reset_parameters(seed, within=f"blocks.{index}.")
        here = [] if mesh is None else block.ffn.shard_experts(mesh)
        shard(block, here)
        owned += here
    rest = {name for name, _ in model.named_children()} - {"blocks"}
    for name in sorted(rest):
        model.get_submodule(name).to_empty(device=device)
    model.tie()
    for name in sorted(rest):
        model.reset_parameters(seed, within=f"{name}.")
    shard(model, owned)
    if mesh is None:
        return None
    require(bool(owned), "train.expert_parallel", expert_parallel, "must be 1: no layer of the model has experts")
    return ExpertParallel(owned, mesh)


def _ignoring(experts: ExpertParallel | None, module: nn.Module) -> nn.Module:
    """The module, marked so that DDP ignores experts sharded over ranks."""
    if experts is not None:
        owned = {id(p) for p in experts.parameters}
        names = [name for name, p in module.named_parameters() if id(p) in owned]
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
    return module


def _expert_mesh(owners: int, device: torch.device) -> Any:
    """Neighbouring ranks share the experts, as communication is fastest within a machine."""
    from torch.distributed.device_mesh import init_device_mesh

    shape = (distributed.world_size() // owners, owners)
    return init_device_mesh(device.type, shape, mesh_dim_names=("expert_replicas", "expert_ranks"))


def _mesh(train: TrainConfig, device: torch.device) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    ranks = distributed.world_size()
    if train.parallel == "fsdp":
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("shards",))
    per_replica = train.shards or int(os.environ.get("LOCAL_WORLD_SIZE", ranks))  # a machine communicates fastest
    require(ranks % per_replica == 0, "train.shards", train.shards, f"must divide the {ranks} processes")
    return init_device_mesh(device.type, (ranks // per_replica, per_replica), mesh_dim_names=("replicas", "shards"))


def _require_device(device: torch.device) -> None:
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if distributed.world_size() > 1 and device.type == "cuda" and local >= torch.cuda.device_count():
        raise MissingBackendError(
            f"process {local} of this machine has no GPU: it has {torch.cuda.device_count()}; start that many "
            "processes (--nproc_per_node), or use device = cpu"
        )
