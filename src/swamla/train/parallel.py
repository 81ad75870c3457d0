"""How a run is spread over processes: each on its own, copies of the model (DDP), or parts of it (FSDP2, HSDP).

However it is spread, rank r learns from the r-th contiguous part of a step's rows, and every number that decides
anything is one number: the count of labels, the gradient's norm, the routers' load. In all of them the weights are
fp32 and matrix products run in autocast's format; what is gathered and reduced is fp32 too, so that a layout changes
no more than the order of sums.
"""

import hashlib
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from swamla import distributed
from swamla.checkpoint import Crew
from swamla.errors import MissingBackendError, SwamlaError, require
from swamla.model.config import LanguageModelConfig
from swamla.model.language_model import LanguageModel
from swamla.ops.layout import Layout

Asked = Literal["auto", "ddp", "fsdp", "hsdp"]
Found = tuple[Tensor, dict[str, Tensor]]
T = TypeVar("T")


@dataclass(frozen=True)
class OwnedExperts:
    """Expert parallelism: of every layer's experts each rank owns some, and tokens travel to those that own theirs.

    parameters: of the experts, DTensors.  mesh: its second dimension is over the owners of all experts together, its
    first over copies of that.
    """

    parameters: list[nn.Parameter]
    mesh: Any

    def describe(self) -> str:
        """For people."""
        return f"; the experts of a layer over {self.mesh.size(1)} of them (expert parallelism)"

    def average_gradients(self) -> None:
        """Of what each copy found for its own ranks' rows make the mean over all ranks, as of all other gradients."""
        for p in self.parameters:
            if p.grad is not None:
                gradient = distributed.local(p.grad)
                if self.mesh.size(0) > 1:
                    torch.distributed.all_reduce(gradient, group=self.mesh.get_group(0))
                gradient /= distributed.world_size()


@dataclass(frozen=True)
class Spread:
    """A model as one process alone holds it.

    model: with the names and shapes of all its parameters, whichever parts are here.
    experts: where ranks share them out, whatever becomes of the rest.
    """

    model: LanguageModel
    experts: OwnedExperts | None = field(default=None, kw_only=True)

    def describe(self) -> str | None:
        """For people, where there is something to tell."""
        return None

    def loss(self, tokens_BT: Tensor, labels_BT: Tensor, seq: Layout) -> Found:
        """`LanguageModel.loss` of this rank's rows, whose backward pass leaves the mean of all ranks' gradients."""
        return self.model.loss(tokens_BT, labels_BT, seq)

    @contextmanager
    def backward_pass(self, *, last: bool) -> Iterator[None]:
        """The context of a micro-batch's passes: ranks exchange gradients in a step's last one only."""
        with self.exchanging(last):
            yield
        if last and self.experts is not None:
            self.experts.average_gradients()

    def exchanging(self, last: bool) -> AbstractContextManager[object]:
        """While entered, gradients of all but owned experts are exchanged by the backward pass, if it is the last."""
        return nullcontext()

    def gradients(self) -> list[Tensor]:
        """This rank's part of every gradient, to be changed in place."""
        return [distributed.local(p.grad) for p in self.model.parameters() if p.grad is not None]

    def gradient_norm(self) -> float:
        """The norm of the whole gradient: squares are summed in double precision, so that layouts agree on it."""
        held = defaultdict[Any, list[Tensor]](list)
        for p in self.model.parameters():
            if p.grad is not None:
                mesh = p.device_mesh if distributed.sharded(p) else None  # type: ignore[attr-defined]
                held[mesh].append(distributed.local(p.grad))
        squares = [_sum_of_squares(gradients, mesh) for mesh, gradients in held.items()]
        return torch.stack(squares).sum().sqrt().float().item()

    def let_go(self) -> None:
        """After forward passes without a backward pass: free what was gathered, so that changed weights are seen."""


@dataclass(frozen=True)
class Copies(Spread):
    """The whole model on every rank; gradients are averaged while the backward pass runs (DDP)."""

    wrapped: nn.parallel.DistributedDataParallel

    def describe(self) -> str:
        experts = self.experts.describe() if self.experts else ""
        return f"{distributed.world_size()} processes, each with the whole model (ddp){experts}"

    def loss(self, tokens_BT: Tensor, labels_BT: Tensor, seq: Layout) -> Found:
        return self.wrapped(tokens_BT, labels_BT, seq)

    def exchanging(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last else self.wrapped.no_sync()


@dataclass(frozen=True)
class Parts(Spread):
    """Every rank holds a part of each parameter, and gathers a block when it is its turn (FSDP2).

    mesh: its last dimension is over the parts; in HSDP the first is over copies of the whole arrangement.
    Accumulating keeps the whole gradient on every rank until the step's last micro-batch.
    """

    mesh: Any

    def describe(self) -> str:
        copies, parts = self.mesh.shape if self.mesh.ndim == 2 else (1, self.mesh.size())
        experts = self.experts.describe() if self.experts else ""
        if copies == 1:
            return f"{parts} processes, each with a part of the model (fsdp){experts}"
        return f"{copies * parts} processes: {copies} copies of the model, each in {parts} parts (hsdp){experts}"

    def exchanging(self, last: bool) -> AbstractContextManager[object]:
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def let_go(self) -> None:
        self.model.reshard()  # type: ignore[operator]


def _sum_of_squares(gradients: list[Tensor], mesh: Any) -> Tensor:
    """Of the whole of gradients whose parts, where there is a mesh, are along its last dimension."""
    squares = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64)).square().sum()
    if mesh is not None:
        torch.distributed.all_reduce(squares, group=mesh.get_group(mesh.ndim - 1))
    return squares


class _Loss(nn.Module):
    """The model's loss as a forward pass, which is what DDP wraps."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model
        # Never used, so that DDP does not say at every start that there is nothing unused.
        self.unused = nn.Parameter(torch.zeros((), device=model.device))

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor, seq: Layout) -> Found:
        return self.model.loss(tokens_BT, labels_BT, seq)


def build_model(
    config: LanguageModelConfig,
    *,
    parallel: Asked,
    shards: int | None,
    seed: int,
    device: torch.device,
    prepare: Callable[[LanguageModel], None],
    expert_parallel: int = 1,
) -> Spread:
    """The model with the initial weights of `seed`, spread over all ranks as asked; one process holds it plainly.

    prepare: called with the model before it is spread; it may replace modules, but no parameter. Parts are filled
    block by block, so that no rank ever holds more than one block's parameters whole. Raises `ConfigError` for shards
    that do not divide the ranks, and for experts that so many ranks cannot share.
    """
    ranks = distributed.world_size()
    _require_device(device)
    fits = ranks % expert_parallel == 0
    require(fits, "train.expert_parallel", expert_parallel, f"must divide the number of processes, here {ranks}")
    if ranks == 1:
        model = config.build(seed).to(device)
        prepare(model)
        return Spread(model)
    if parallel in ("auto", "ddp"):
        model = config.skeleton()
        prepare(model)
        experts = _fill(model, seed, device, expert_parallel)
        torch._dynamo.config.optimize_ddp = False  # graphs are single blocks: there is nothing to split for buckets
        # Without find_unused_parameters DDP arranges its buckets anew after a process's first step, and more than two
        # ranks then sum in another order: a run that was resumed would differ, in the last bit, from one that went on.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renamed the option, 2.11 knows this name alone
            wrapped = nn.parallel.DistributedDataParallel(
                _ignoring(experts, _Loss(model)),
                broadcast_buffers=False,
                find_unused_parameters=True,
                gradient_as_bucket_view=True,  # gradients are held once, not in the buckets and beside them
            )
        return Copies(model, wrapped, experts=experts)
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh, model = _mesh(parallel, shards, device), config.skeleton()
    prepare(model)
    experts = _fill(
        model,
        seed,
        device,
        expert_parallel,
        lambda module, owned: fully_shard(module, mesh=mesh, ignored_params=set(owned)),
    )
    register_fsdp_forward_method(model, "loss")
    return Parts(model, mesh, experts=experts)


def _fill(
    model: LanguageModel,
    seed: int,
    device: torch.device,
    expert_parallel: int,
    shard: Callable[[nn.Module, list[nn.Parameter]], object] = lambda module, owned: None,
) -> OwnedExperts | None:
    """Give a skeleton its initial weights, block by block; each is cut as soon as it has them.

    shard: called with every block and then with the model, and with the parameters in it that were cut already, those
    of owned experts, which are returned.
    """
    mesh = _expert_mesh(expert_parallel, device) if expert_parallel > 1 else None
    owned: list[nn.Parameter] = []
    for index, block in enumerate(model.blocks):
        block.to_empty(device=device)
        model.reset_weights(seed, within=f"blocks.{index}.")
        here = [] if mesh is None else block.ffn.own_experts(mesh)
        shard(block, here)
        owned += here
    rest = {name for name, _ in model.named_children()} - {"blocks"}
    for name in sorted(rest):
        model.get_submodule(name).to_empty(device=device)
    model.tie()
    for name in sorted(rest):
        model.reset_weights(seed, within=f"{name}.")
    shard(model, owned)
    if mesh is None:
        return None
    require(bool(owned), "train.expert_parallel", expert_parallel, "must be 1: no layer of the model has experts")
    return OwnedExperts(owned, mesh)


def _ignoring(experts: OwnedExperts | None, module: nn.Module) -> nn.Module:
    """The module, marked so that DDP leaves owned experts alone."""
    if experts is not None:
        owned = {id(p) for p in experts.parameters}
        names = [name for name, p in module.named_parameters() if id(p) in owned]
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
    return module


def _expert_mesh(owners: int, device: torch.device) -> Any:
    """Neighbours own experts together, as exchange is fastest within a machine."""
    from torch.distributed.device_mesh import init_device_mesh

    shape = (distributed.world_size() // owners, owners)
    return init_device_mesh(device.type, shape, mesh_dim_names=("expert_copies", "owners"))


def _mesh(parallel: Asked, shards: int | None, device: torch.device) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    ranks = distributed.world_size()
    if parallel == "fsdp":
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("parts",))
    per_copy = shards or _on_this_node(ranks)
    require(ranks % per_copy == 0, "train.shards", shards, f"must divide the {ranks} processes")
    return init_device_mesh(device.type, (ranks // per_copy, per_copy), mesh_dim_names=("copies", "parts"))


def _on_this_node(ranks: int) -> int:
    """How many processes torchrun started on one machine: within it exchange is fastest."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks))


def _require_device(device: torch.device) -> None:
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if distributed.world_size() > 1 and device.type == "cuda" and local >= torch.cuda.device_count():
        raise MissingBackendError(
            f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}, so start as many "
            "processes (--nproc_per_node), or use device = cpu"
        )


class _Ranks(Crew):
    """All ranks, which write a checkpoint together; over a group of its own, as a thread may do it meanwhile."""

    def __init__(self) -> None:
        self.rank = distributed.rank()
        self._group = torch.distributed.new_group(backend="gloo")

    def together(self, work: Callable[[], T]) -> list[T]:
        found: list[Any] = [None] * distributed.world_size()
        error = mine = None
        try:
            mine = work()
        except Exception as caught:
            error = caught
        torch.distributed.all_gather_object(found, (mine, None if error is None else str(error)), group=self._group)
        if error is not None:
            raise error
        for number, (_, message) in enumerate(found):
            if message is not None:
                raise SwamlaError(f"rank {number}: {message}")
        return [result for result, _ in found]

    def any(self, flag: bool) -> bool:
        return bool(distributed.highest(flag))


def make_crew() -> Crew:
    """The processes that write this run's checkpoints."""
    return _Ranks() if distributed.world_size() > 1 else Crew()


def clip(gradients: Sequence[Tensor], norm: float, largest: float) -> None:
    """Scale gradients whose norm is `norm` down to `largest`, if they exceed it."""
    if norm > largest:
        torch._foreach_mul_(list(gradients), largest / (norm + 1e-6))


def seed_ranks(seed: int, step: int) -> None:
    """Before a step of several ranks: each draws its own dropout, a function of seed, step and rank.

    So nothing of it needs to be saved. One process alone goes on with its generator, which its checkpoints hold.
    """
    if distributed.world_size() > 1:
        key = hashlib.sha256(f"{seed}/step {step}/rank {distributed.rank()}".encode()).digest()[:8]
        torch.manual_seed(int.from_bytes(key, "little") >> 1)
