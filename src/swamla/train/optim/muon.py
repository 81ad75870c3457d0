"""Muon (Keller Jordan, 2024; arXiv 2502.16982): momentum, orthogonalised; equal shapes orthogonalised as one stack."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swamla.errors import require
from swamla.train.optim.adamw import adamw, check_adam
from swamla.train.optim.named import EMBEDDINGS, NamedOptimizer, Part, named_parameters
from swamla.train.precision import bf16_is_fast

# Of the quintic x -> ax + bx³ + cx⁵ whose slope at 0 is largest; singular values end between 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NOT_HIDDEN = EMBEDDINGS | {"head.weight"}


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Muon for the matrices inside the blocks, AdamW for all else, at one learning rate.

    A matrix's update is scaled by 0.2·√(longer side), which gives it the size of an AdamW update (arXiv 2502.16982,
    eq. 4), so that learning rates and weight decay tuned for AdamW serve both.
    momentum: of Muon.  iterations: of Newton–Schulz.  betas, eps: of AdamW.
    """

    kind: ClassVar[str] = "muon"
    momentum: float = 0.95
    iterations: int = 5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        require(0 <= self.momentum < 1, "momentum", self.momentum, "must be at least 0 and below 1, e.g. 0.95")
        require(1 <= self.iterations < 100, "iterations", self.iterations, "must be 1 … 99, e.g. 5")
        check_adam(self.betas, self.eps)

    def build(self, model: nn.Module, *, lr: float, weight_decay: float) -> NamedOptimizer:
        """The optimizer of all trainable parameters of `model`."""
        parameters = named_parameters(model)
        hidden = [p for name, p in parameters if is_hidden_matrix(name, p)]
        others = [(name, p) for name, p in parameters if not is_hidden_matrix(name, p)]
        parts = []
        if others:
            parts.append(adamw(others, lr, weight_decay, self.betas, self.eps))
        if hidden:
            muon = Muon(hidden, lr=lr, weight_decay=weight_decay, momentum=self.momentum, iterations=self.iterations)
            parts.append(Part(muon, frozenset({"momentum_buffer"})))
        return NamedOptimizer(parts, parameters)


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """True for a matrix that maps activations to activations; filters of a depthwise convolution are none."""
    return parameter.ndim == 2 and name not in NOT_HIDDEN and min(parameter.shape) > 8


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` with Nesterov momentum and `match_rms_adamw`, over stacks instead of a loop over matrices."""

    def __init__(
        self, params: list[nn.Parameter], *, lr: float, weight_decay: float, momentum: float = 0.95, iterations: int = 5
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "iterations": iterations}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient. `closure` is not used."""
        for group in self.param_groups:
            params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params, [p.grad for p in params if p.grad is not None])

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        momentum, lr = group["momentum"], group["lr"]
        buffers = [self._buffer(p) for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        updates = orthogonalise_all(torch._foreach_lerp(grads, buffers, momentum), group["iterations"])
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        for p, update in zip(params, updates, strict=True):
            p.add_(update, alpha=-lr * 0.2 * math.sqrt(max(p.shape)))

    def _buffer(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]


def orthogonalise_all(matrices: Sequence[Tensor], iterations: int) -> list[Tensor]:
    """`orthogonalise` each matrix; those whose sides are the same two numbers, either way round, go as one stack."""
    stacks: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        stacks[tuple(sorted(matrix.shape))].append(index)
    out: list[Tensor] = [torch.empty(0)] * len(matrices)
    for members in stacks.values():
        wide = [matrices[i] if matrices[i].shape[0] <= matrices[i].shape[1] else matrices[i].mT for i in members]
        dtype = torch.bfloat16 if bf16_is_fast(wide[0].device) else torch.float32
        stack_NAB = orthogonalise(torch.stack(wide).to(dtype), iterations)
        for i, update in zip(members, stack_NAB, strict=True):
            out[i] = update if matrices[i].shape[0] <= matrices[i].shape[1] else update.mT
    return out


def orthogonalise(stack_NAB: Tensor, iterations: int) -> Tensor:
    """Push the singular values of N matrices (A <= B) towards 1, by Newton–Schulz in the stack's own number format."""
    a, b, c = COEFFICIENTS
    x_NAB = stack_NAB / torch.linalg.matrix_norm(stack_NAB, keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram_NAA = x_NAB @ x_NAB.mT
        poly_NAA = torch.baddbmm(gram_NAA, gram_NAA, gram_NAA, beta=b, alpha=c)
        x_NAB = torch.baddbmm(x_NAB, poly_NAA, x_NAB, beta=a)
    return x_NAB
