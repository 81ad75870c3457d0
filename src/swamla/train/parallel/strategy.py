"""Data-parallel strategies: one process, copies of the model (DDP), or shards of it (FSDP2, HSDP).

Whichever it is, rank r learns from the r-th contiguous part of a step's rows, and every number that decides anything is
one number: the count of labels, the gradient's norm, the routers' load. In all of them the weights are fp32 and matrix
products run in autocast's format; what is gathered and reduced is fp32 too, so that a layout changes no more than the
order of sums.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from swamla import distributed
from swamla.model.language_model import LanguageModel
from swamla.ops.layout import Layout

Found = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class ExpertParallel:
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
class Strategy:
    """A model as one process alone holds it.

    model: with the names and shapes of all its parameters, whichever parts are here.
    experts: where ranks share them out, whatever becomes of the rest.
    """

    model: LanguageModel
    experts: ExpertParallel | None = field(default=None, kw_only=True)

    def describe(self) -> str | None:
        """For people, where there is something to tell."""
        return None

    def loss(self, tokens_BT: Tensor, labels_BT: Tensor, seq: Layout) -> Found:
        """`LanguageModel.loss` of this rank's rows, whose backward pass leaves the mean of all ranks' gradients."""
        return self.model.loss(tokens_BT, labels_BT, seq)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """The context of a micro-batch's passes: ranks exchange gradients in a step's last one only."""
        with self.gradient_sync(last):
            yield
        if last and self.experts is not None:
            self.experts.average_gradients()

    def gradient_sync(self, last: bool) -> AbstractContextManager[object]:
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

    def reshard(self) -> None:
        """After forward passes without a backward pass: free what was gathered, so that changed weights are seen."""


@dataclass(frozen=True)
class DDPStrategy(Strategy):
    """The whole model on every rank; gradients are averaged while the backward pass runs (DDP)."""

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

    def gradient_sync(self, last: bool) -> AbstractContextManager[object]:
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def reshard(self) -> None:
        self.model.reshard()  # type: ignore[operator]


def _sum_of_squares(gradients: list[Tensor], mesh: Any) -> Tensor:
    """Of the whole of gradients whose parts, where there is a mesh, are along its last dimension."""
    squares = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64)).square().sum()
    if mesh is not None:
        torch.distributed.all_reduce(squares, group=mesh.get_group(mesh.ndim - 1))
    return squares


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
