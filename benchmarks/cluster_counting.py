"""One rank of a cluster that is not there: what it holds and what it sends in a step, reckoned and counted.

`planned` reckons it from the shapes of the parameters and the rules of FSDP2, DDP and our expert parallelism. `counted`
lets the project's own code build, shard and train the model for one step, on fake tensors, which have shapes and no
storage, under torch's fake process group, whose collectives return at once. A test holds the two together. In
`counted` three things stand in for what needs numbers: every expert gets as many tokens as every other, the loss is
plain cross-entropy on the head's weights, and mixers compute by their references. None of them changes what is sent.
DDP's reducer needs storage: its buckets are reckoned in both.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from math import prod
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed import device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_models import preset
from benchmarks.gpu_running import Place
from swamla import distributed
from swamla.model import LanguageModelConfig, count_parameters
from swamla.model import language_model as lm
from swamla.model.accounting import ParameterSpec, activation_bytes, parameter_specs
from swamla.model.ffns.moe import MoEConfig
from swamla.ops import exchange
from swamla.ops.cross_entropy import soft_cap
from swamla.ops.layout import Layout
from swamla.train.config import Parallel, TrainConfig
from swamla.train.optim import AdamWConfig
from swamla.train.parallel.build import build_model
from swamla.train.parallel.strategy import Strategy

PER_NODE = 8  # GPUs that NVLink joins
BUCKET = 25 << 20  # bytes of gradients that DDP reduces at a time
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A preset on so many ranks. rows: of 2,048 tokens that a rank has in a step, all in one micro-batch."""

    name: str
    ranks: int
    parallel: Parallel
    shards: int | None = None
    experts: int = 1
    rows: int = 8
    length: int = 2048
    quick: bool = False

    @property
    def tokens(self) -> int:
        """Of a rank in a step."""
        return self.rows * self.length

    @property
    def shard_count(self) -> int:
        """Ranks that hold the model together, experts apart."""
        return {"ddp": 1, "fsdp": self.ranks}.get(self.parallel) or self.shards or PER_NODE

    @property
    def config(self) -> LanguageModelConfig:
        """The preset's model."""
        return preset(self.name, "swa", Place(device="cpu", quick=self.quick))

    @property
    def settings(self) -> TrainConfig:
        """How the project is asked for it."""
        return TrainConfig(steps=1, seed=0, parallel=self.parallel, shards=self.shards, expert_parallel=self.experts)

    def __str__(self) -> str:
        shards = f" {self.shards}" if self.parallel == "hsdp" else ""
        experts = f", experts over {self.experts}" if self.experts > 1 else ""
        return f"{self.name}, {self.ranks:,} × {self.parallel}{shards}{experts}"


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A collective.

    kind: all-gather, reduce-scatter, all-reduce or all-to-all.
    n_bytes: of the whole: what an all-gather leaves on each rank, what goes into the others on each.
    ranks: of the group.  near: how many of them are on one node.
    after: issued when the backward pass is over, so that nothing hides it.
    """

    kind: str
    n_bytes: int
    ranks: int
    near: int
    after: bool = False

    @property
    def wire_bytes(self) -> float:
        """What a rank sends: all but its own part, and twice that for an all-reduce, in a ring."""
        return (2 if self.kind == "all-reduce" else 1) * self.n_bytes * (self.ranks - 1) / self.ranks


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Bytes that a rank holds, by what they are, and its collectives of a step in their order."""

    memory: dict[str, int]
    sent: list[Sent]


def counted(plan: Plan) -> Counted:
    """A step of the plan's first rank."""
    config = plan.config
    with _fake_ranks(plan.ranks), ExitStack() as patched:
        for substitute in _substitutes(plan):
            patched.enter_context(substitute)
        patched.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        strategy = build_model(
            _MadeOutside(**vars(config.with_backends(dict.fromkeys(config.blocks, "reference")))),
            train=plan.settings,
            device=CPU,
            prepare=lambda model: None,
        )
        sent = _step(strategy, plan)
        own = [tuple(distributed.local(p.detach()).shape) for p in strategy.model.parameters()]
        found = Counted(memory=_memory(plan, own, sent), sent=sent)
        found.memory["gradients"] = sum(gradient.nbytes for gradient in strategy.gradients())
        return found


def planned(plan: Plan) -> Counted:
    """The same by arithmetic."""
    config, blocks = plan.config, plan.config.depth
    units: list[list[ParameterSpec]] = [[] for _ in range(blocks + 1)]  # what is gathered at once; the root comes last
    experts: list[ParameterSpec] = []
    for spec in parameter_specs(config):
        place = spec.name.split(".")
        owned = plan.experts > 1 and ".ffn.experts." in spec.name
        (experts if owned else units[int(place[1]) if place[0] == "blocks" else -1]).append(spec)
    every, shards = list(range(plan.ranks)), plan.shard_count
    own = [_part(spec, plan.experts) for spec in experts] + [_part(spec, shards) for unit in units for spec in unit]
    sent: list[Sent] = []
    if plan.parallel == "ddp":
        sent += _buckets(sum(4 * prod(spec.shape) for unit in units for spec in unit), every)
    else:
        wholes = [sum(4 * shards * prod(_part(spec, shards)) for spec in unit) for unit in units]
        *of_blocks, root = [_sent("all-gather", whole, every[:shards]) for whole in wholes]
        sent += [root, *of_blocks, *reversed(of_blocks)]
        for whole in [*reversed(wholes[:-1]), wholes[-1]]:
            sent.append(_sent("reduce-scatter", whole, every[:shards]))
            if plan.ranks > shards:
                sent.append(_sent("all-reduce", whole // shards, every[::shards]))
    if plan.experts > 1:
        sent += _to_experts(plan, [_part(spec, plan.experts) for spec in experts])
    if plan.parallel != "ddp":
        sent.append(_sent("all-reduce", 8, every[:shards], after=True))
    return Counted(memory=_memory(plan, own, sent), sent=sent)


def _part(spec: ParameterSpec, count: int) -> tuple[int, ...]:
    """The shape of the first of `count` shards, which are cut along the first dimension and padded to equal ones."""
    return (-(-spec.shape[0] // count), *spec.shape[1:])


def _buckets(n_bytes: int, ranks: list[int]) -> Iterator[Sent]:
    """DDP's: gradients of all parameters that every rank has."""
    for start in range(0, n_bytes, BUCKET):
        yield _sent("all-reduce", min(n_bytes - start, BUCKET), ranks)


def _to_experts(plan: Plan, own: list[tuple[int, ...]]) -> Iterator[Sent]:
    """What expert parallelism sends: tokens by the counts, their gradients, the experts' gradients, their norm."""
    ranks = list(range(plan.ranks))
    for ffn in (block.ffn for block in plan.config.layers):
        if isinstance(ffn, MoEConfig):
            yield _sent("all-to-all", 8 * ffn.n_experts, ranks[: plan.experts])
            rows = 2 * plan.tokens * ffn.n_activated * ffn.routed_dims(plan.config.width)[0]
            yield from [_sent("all-to-all", rows, ranks[: plan.experts])] * 4
    if plan.ranks > plan.experts:
        for shape in own:
            yield _sent("all-reduce", 4 * prod(shape), ranks[:: plan.experts], after=True)
    yield _sent("all-reduce", 8, ranks[: plan.experts], after=True)


@contextmanager
def _fake_ranks(count: int) -> Iterator[None]:
    """A process group of which this process is the first rank, and whose collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    with patch.dict(os.environ, LOCAL_WORLD_SIZE=str(min(PER_NODE, count))):
        dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
        try:
            yield
        finally:
            dist.destroy_process_group()


class _MadeOutside(LanguageModelConfig):
    """Its skeleton consists of plain meta tensors, which can become fake ones; fake ones cannot be swapped."""

    def skeleton(self) -> lm.LanguageModel:
        with unset_fake_temporarily():
            return super().skeleton()


def _substitutes(plan: Plan) -> Iterator[Any]:
    """What stands in for code that asks tensors for numbers."""
    make = device_mesh.init_device_mesh

    def mesh(*args: Any, **options: Any) -> Any:
        with unset_fake_temporarily():
            return make(*args, **options)

    def counts(load_E: Tensor, group: Any) -> tuple[Tensor, list[int], list[int]]:
        processes = dist.get_world_size(group)
        arriving_E = torch.empty_like(load_E)
        dist.all_to_all_single(arriving_E, load_E, group=group)
        activated = next(block.ffn.n_activated for block in plan.config.layers if isinstance(block.ffn, MoEConfig))
        rows = balanced(plan.tokens * activated, processes)
        return arriving_E.view(processes, -1), rows, [rows[0]] * processes

    def loss(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, *, cap: float) -> Tensor:
        return F.cross_entropy(soft_cap(F.linear(x_ND, weight_VD).float(), cap), labels_N, reduction="sum")

    yield patch.object(device_mesh, "init_device_mesh", mesh)
    yield patch.object(exchange, "_counts", counts)
    yield patch.object(lm, "chunked_cross_entropy", loss)
    yield patch.object(nn.parallel, "DistributedDataParallel", _Replica)


def balanced(rows: int, processes: int) -> list[int]:
    """Rows for each process, as even as they can be."""
    return [rows // processes + (place < rows % processes) for place in range(processes)]


class _Replica(nn.Module):
    """Stands in for DDP, whose reducer needs storage."""

    def __init__(self, module: nn.Module, **_: Any) -> None:
        super().__init__()
        self.module = module

    @staticmethod
    def _set_params_and_buffers_to_ignore_for_model(module: nn.Module, names: list[str]) -> None:
        pass

    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)


@dataclass
class _Collectives(TorchDispatchMode):
    """Notes every collective."""

    sent: list[Sent] = field(default_factory=list)
    after: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "c10d":
            self._note(op, args)
        return op(*args, **(kwargs or {}))

    def _note(self, op: Any, args: Any) -> None:
        from torch.distributed._tools.fake_collectives import CollectiveOp

        kind, whole = _KINDS[op._opname]
        ranks = dist.get_process_group_ranks(CollectiveOp.get_process_group(op, args))
        self.sent.append(_sent(kind, whole(args).nbytes, ranks, after=self.after))


_KINDS: dict[str, tuple[str, Callable[[Any], Tensor]]] = {
    "_allgather_base_": ("all-gather", lambda args: args[0]),
    "_reduce_scatter_base_": ("reduce-scatter", lambda args: args[1]),
    "allreduce_": ("all-reduce", lambda args: args[0][0]),
    "alltoall_base_": ("all-to-all", lambda args: args[1]),
}


def _sent(kind: str, n_bytes: int, ranks: list[int], *, after: bool = False) -> Sent:
    near = sum(rank < PER_NODE for rank in ranks)
    return Sent(kind=kind, n_bytes=n_bytes, ranks=len(ranks), near=near, after=after)


def _step(strategy: Strategy, plan: Plan) -> list[Sent]:
    """Forward, backward and the gradient's norm, as `training_step` takes them."""
    tokens_BT = torch.zeros(plan.rows, plan.length, dtype=torch.int64)
    seq = Layout.one_document_per_row(plan.rows, plan.length)
    # A stand-in for DDP has no `no_sync`, and the last micro-batch needs none.
    sync = nullcontext() if plan.parallel == "ddp" else strategy.gradient_sync(last=True)
    with _Collectives() as collectives, sync:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total, _ = strategy.loss(tokens_BT, tokens_BT, seq)
        total.backward()
        if plan.parallel == "ddp":
            reduced = sum(p.nbytes for p in strategy.model.parameters() if not distributed.sharded(p))
            collectives.sent += _buckets(reduced, list(range(plan.ranks)))
        collectives.after = True
        if strategy.experts is not None:
            strategy.experts.average_gradients()
        strategy.gradient_norm()
    return collectives.sent


def _memory(plan: Plan, own: list[tuple[int, ...]], sent: list[Sent]) -> dict[str, int]:
    """Bytes on a rank whose parameters have the shapes `own`; exact but for what is gathered and for activations."""
    gathered = [one.n_bytes for one in sent if one.kind == "all-gather"]
    scattered = [one.n_bytes for one in sent if one.kind == "reduce-scatter"]
    whole_copies = activation_bytes(plan.config, 0, element_bytes=2, device="cuda")
    activations = activation_bytes(plan.config, plan.tokens, element_bytes=2, length=plan.length, device="cuda")
    experts = 2 * count_parameters(plan.config).by_component.get("experts", 0)
    return {
        "weights": 4 * sum(map(prod, own)),
        "gradients": 4 * sum(map(prod, own)),
        "AdamW": AdamWConfig().state_bytes(ParameterSpec("", shape) for shape in own),
        # The root's weights from the first layer to the last, a block's and the next one's, and a block's gradients.
        "gathered": gathered[0] + 2 * max(gathered[1:]) + max(scattered) if gathered else 0,
        # Autograd keeps every matrix in bf16, whole, whatever is sharded; but of the experts a rank has its own alone.
        "bf16 copies": whole_copies - experts + experts // plan.experts,
        "activations": activations - whole_copies,
    }
