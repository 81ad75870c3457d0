"""Data-parallel strategies: one process, replicas of the model (DDP), or shards of it (FSDP2, HSDP).

In each, rank r trains on the r-th contiguous slice of a step's rows. All ranks have the same label count, gradient norm
and router load, so that they decide alike. Weights are fp32 and matrix products run in
autocast's dtype; gathers and reductions are fp32 too, so that a strategy changes only the order of sums.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from swamla import distributed
from swamla.model.language_model import LanguageModel
from swamla.ops.layout import Layout

Parallel = Literal["auto", "ddp", "fsdp", "hsdp"]
Found = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class ExpertParallel:
    """Expert parallelism: each rank owns some experts of every layer; tokens are sent to the owners of their experts.

    parameters: of the experts, as DTensors.  mesh: (replicas, expert-parallel ranks).
    """

    parameters: list[nn.Parameter]
    mesh: Any

    def describe(self) -> str:
        """As text for the console."""
        return f"; the experts of a layer over {self.mesh.size(1)} of them (expert parallelism)"

    def average_gradients(self) -> None:
        """Average the experts' gradients over all ranks, as DDP and FSDP do for the other parameters.

        Before this, each replica has the sum over its own ranks' rows.
        """
        for p in self.parameters:
            if p.grad is not None:
                gradient = distributed.local(p.grad)
                if self.mesh.size(0) > 1:
                    torch.distributed.all_reduce(gradient, group=self.mesh.get_group(0))
                gradient /= distributed.world_size()


@dataclass(frozen=True)
class Strategy:
    """The strategy for a single process, and the base of the others.

    model: with all parameters' names and full shapes, even if only shards are on this rank.
    experts: expert parallelism, if there is any; independent of the strategy for other parameters.
    keeps_weights: whether a weight is the same tensor in all micro-batches of a step.
    """

    keeps_weights: ClassVar[bool] = True
    model: LanguageModel
    experts: ExpertParallel | None = field(default=None, kw_only=True)

    def describe(self) -> str | None:
        """As text for the console; None for a single process."""
        return None

    def loss(self, tokens_BT: Tensor, labels_BT: Tensor, seq: Layout) -> Found:
        """`LanguageModel.loss` of this rank's rows; its backward pass averages gradients over all ranks."""
        return self.model.loss(tokens_BT, labels_BT, seq)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Context of a micro-batch's forward and backward pass; gradients are reduced in the last one of a step."""
        with self.gradient_sync(last):
            yield
        if last and self.experts is not None:
            self.experts.average_gradients()

    def gradient_sync(self, last: bool) -> AbstractContextManager[object]:
        """Context of a backward pass that, if `last`, reduces gradients over the ranks, except those of experts."""
        return nullcontext()

    def gradients(self) -> list[Tensor]:
        """This rank's shard of every gradient, to be changed in place."""
        return [distributed.local(p.grad) for p in self.model.parameters() if p.grad is not None]

    def gradient_norm(self) -> Tensor:
        """The norm of the full gradient, an fp32 scalar on its device.

        Summed in double precision so that strategies agree on it.
        """
        by_mesh = defaultdict[Any, list[Tensor]](list)
        for p in self.model.parameters():
            if p.grad is not None:
                mesh = p.device_mesh if distributed.sharded(p) else None  # type: ignore[attr-defined]
                by_mesh[mesh].append(distributed.local(p.grad))
        squares = [_sum_of_squares(gradients, mesh) for mesh, gradients in by_mesh.items()]
        return torch.stack(squares).sum().sqrt().float()

    def reshard(self) -> None:
        """Free parameters gathered by forward passes without a backward pass, which an update would make stale."""


@dataclass(frozen=True)
class DDPStrategy(Strategy):
    """The whole model on every rank; gradients are averaged during the backward pass (DDP)."""

    wrapped: nn.parallel.DistributedDataParallel

    def describe(self) -> str:
        experts = self.experts.describe() if self.experts else ""
        return f"{distributed.world_size()} processes, each with the whole model (ddp){experts}"

    def loss(self, tokens_BT: Tensor, labels_BT: Tensor, seq: Layout) -> Found:
        return self.wrapped(tokens_BT, labels_BT, seq)

    def gradient_sync(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last else self.wrapped.no_sync()


@dataclass(frozen=True)
class FSDPStrategy(Strategy):
    """Every rank has a shard of each parameter and gathers one block at a time (FSDP2).

    mesh: (shards,), or with HSDP (replicas, shards).
    Accumulation keeps the full gradient on every rank until the step's last micro-batch.
    """

    # Weights are gathered anew: with casts shared by micro-batches gradients were wrong.
    keeps_weights: ClassVar[bool] = False
    mesh: Any

    def describe(self) -> str:
        replicas, shards = self.mesh.shape if self.mesh.ndim == 2 else (1, self.mesh.size())
        experts = self.experts.describe() if self.experts else ""
        if replicas == 1:
            return f"{shards} processes, each with a shard of the model (fsdp){experts}"
        return (
            f"{replicas * shards} processes: {replicas} replicas of the model, each in {shards} shards (hsdp){experts}"
        )

    def gradient_sync(self, last: bool) -> AbstractContextManager[object]:
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def reshard(self) -> None:
        self.model.reshard()  # type: ignore[operator]


def _sum_of_squares(gradients: list[Tensor], mesh: Any) -> Tensor:
    """Sum of squares of the full gradients, which are sharded over the last dimension of `mesh` if there is one."""
    squares = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64)).square().sum()
    if mesh is not None:
        torch.distributed.all_reduce(squares, group=mesh.get_group(mesh.ndim - 1))
    return squares


def clip(gradients: Sequence[Tensor], norm: float, largest: float) -> None:
    """Scale gradients of norm `norm` down to the norm `largest` if they exceed it."""
    if norm > largest:
        torch._foreach_mul_(list(gradients), largest / (norm + 1e-6))


def seed_ranks(seed: int, step: int) -> None:
    """On several ranks, seed a step's dropout by seed, step and rank, so that it needs no saved state.

    A single process continues with its generator, whose state is in the checkpoints.
    """
    if distributed.world_size() > 1:
        key = hashlib.sha256(f"{seed}/step {step}/rank {distributed.rank()}".encode()).digest()[:8]
        torch.manual_seed(int.from_bytes(key, "little") >> 1)
