"""AdamW (arXiv 1711.05101), fused."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from swamla.errors import require
from swamla.train.optim.named import NamedOptimizer, NamedParameters, Part, decay_groups, named_parameters


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW. betas: decay of the gradient's first and second moment.  eps: added to the root of the second."""

    kind: ClassVar[str] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_adam(self.betas, self.eps)

    def build(self, model: nn.Module, *, lr: float, weight_decay: float) -> NamedOptimizer:
        """The optimizer of all trainable parameters of `model`."""
        parameters = named_parameters(model)
        return NamedOptimizer([adamw(parameters, lr, weight_decay, self.betas, self.eps)], parameters)


def check_adam(betas: tuple[float, float], eps: float) -> None:
    """Raise `ConfigError` unless the moments decay and the division is safe."""
    require(all(0 <= beta < 1 for beta in betas), "betas", betas, "must each be at least 0 and below 1, e.g. 0.9, 0.95")
    require(eps > 0, "eps", eps, "must be > 0, e.g. 1e-8")


def adamw(parameters: NamedParameters, lr: float, weight_decay: float, betas: tuple[float, float], eps: float) -> Part:
    """torch's fused AdamW with decay on matrices only; CPU and CUDA both have the fused kernel, bit-deterministic."""
    groups = decay_groups(parameters, weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    return Part(optimizer, frozenset({"step", "exp_avg", "exp_avg_sq"}))
