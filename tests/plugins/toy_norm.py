"""A norm in one file: by the mean of the absolute values."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import swamla
from swamla.errors import require
from swamla.model import NormConfig


@swamla.register
@dataclass(frozen=True, kw_only=True)
class ToyNormConfig(NormConfig):
    """x / mean |x| · γ.

    eps: added to the mean.
    """

    kind: ClassVar[str] = "toy_norm"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        require(self.eps > 0, "eps", self.eps, "must be > 0, e.g. 1e-5")

    def build(self, width: int) -> nn.Module:
        """The module, its gain at 1."""
        return ToyNorm(width, self.eps)

    def n_parameters(self, width: int) -> int:
        """The gain."""
        return width


class ToyNorm(nn.Module):
    """x / mean |x| · γ, in the dtype of x."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Any shape whose last dimension is the width; same shape out."""
        return (x / (x.abs().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)
