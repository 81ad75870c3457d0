"""AdamW (arXiv 1711.05101): torch's fused implementation, or our own with moments in fewer bits."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from swamla.errors import require
from swamla.model.accounting import ParameterSpec
from swamla.registry import register
from swamla.train.optim.elementwise import Chunk, Elementwise, coarser_moments, require_whole
from swamla.train.optim.moments import Moments
from swamla.train.optim.named import (
    NamedOptimizer,
    NamedParameters,
    OptimizerConfig,
    Shape,
    StateTensor,
    adam_width_multiple,
    decay_groups,
    named_parameters,
)
from swamla.train.precision import Chosen


@register
@dataclass(frozen=True, kw_only=True)
class AdamWConfig(OptimizerConfig):
    """AdamW. The original project called it FP8AdamW with bf16 moments, though nothing in it was FP8.

    betas: decay of the gradient's first and second moment.
    eps: added to the root of the second moment.
    moments: "fp32", 8 bytes per parameter; "bf16" with stochastic rounding, 4; "8bit" with torchao's map, about 2.
    """

    kind: ClassVar[str] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    moments: Moments = "fp32"

    def __post_init__(self) -> None:
        check_adam(self.betas, self.eps)

    def build(self, model: nn.Module, *, lr: float, weight_decay: float, precision: Chosen = "fp32") -> NamedOptimizer:
        """The optimizer of all trainable parameters of `model`. Raises `MissingBackendError` without torchao."""
        parameters = named_parameters(model)
        adamw: torch.optim.Optimizer
        if self.moments == "fp32":
            adamw = fused_adamw(parameters, lr, weight_decay, self.betas, self.eps)
        else:
            groups = decay_groups(parameters, weight_decay)
            require_whole(parameters, self.moments)
            adamw = AdamW(groups, lr=lr, betas=self.betas, eps=self.eps, moments=self.moments)
        return NamedOptimizer([adamw], parameters, self.state_specs)

    def state_specs(self, parameter: ParameterSpec) -> Mapping[str, StateTensor]:
        """Both moments and the number of updates."""
        return AdamW.state_specs(parameter.shape, self.moments)

    def width_multiple(self, parameter: ParameterSpec, base: Shape) -> float:
        """µP's rule for Adam."""
        return adam_width_multiple(parameter, base)

    def coarser(self) -> Iterator[tuple[str, Self]]:
        """Both moments in fewer bits."""
        return coarser_moments(self, self.moments)


def check_betas(betas: tuple[float, float], example: str) -> None:
    """Raise `ConfigError` unless every beta is at least 0 and below 1."""
    allowed = f"must each be at least 0 and below 1, e.g. {example}"
    require(all(0 <= beta < 1 for beta in betas), "betas", betas, allowed)


def check_adam(betas: tuple[float, float], eps: float) -> None:
    """Raise `ConfigError` unless the betas are valid and `eps` is positive."""
    check_betas(betas, "0.9, 0.95")
    require(eps > 0, "eps", eps, "must be > 0, e.g. 1e-8")


def fused_adamw(
    parameters: NamedParameters, lr: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """torch's fused AdamW, with decay on matrices only; its kernels for CPU and CUDA are bit-deterministic."""
    return torch.optim.AdamW(decay_groups(parameters, weight_decay), lr=lr, betas=betas, eps=eps, fused=True)


class AdamW(Elementwise):
    """AdamW with moments in any format: the arithmetic is fp32, only stored moments are rounded."""

    SIGNED: ClassVar[dict[str, bool]] = {"exp_avg": True, "exp_avg_sq": False}
    COUNTS: ClassVar[bool] = True

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float, moments: Moments
    ) -> None:
        super().__init__(groups, moments, {"lr": lr, "betas": betas, "eps": eps})

    def update(self, chunks: list[Chunk], values: dict[str, list[Tensor]], group: dict[str, Any]) -> None:
        """One step of algorithm 2 of the paper."""
        (beta1, beta2), lr, eps = group["betas"], group["lr"], group["eps"]
        weights, gradients = [chunk.weights for chunk in chunks], [chunk.gradients for chunk in chunks]
        first, second = values["exp_avg"], values["exp_avg_sq"]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        root = torch._foreach_sqrt(second)
        torch._foreach_div_(root, [math.sqrt(1 - beta2**chunk.updates) for chunk in chunks])
        torch._foreach_add_(root, eps)
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(weights, first, root, [-lr / (1 - beta1**chunk.updates) for chunk in chunks])
