"""No FFN: the layer is its mixer alone, as in toy models of recall (arXiv 2312.04927)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from swamla.model.ffns.ffn import FFN, FFNConfig, Statistics
from swamla.ops.layout import Layout
from swamla.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class NoFFNConfig(FFNConfig):
    """No FFN: the layer is its mixer alone, without a second norm."""

    kind: ClassVar[str] = "none"
    sign: ClassVar[str] = "-"
    style: ClassVar[str] = "dim"
    outputs: ClassVar[tuple[str, ...]] = ()
    is_absent: ClassVar[bool] = True

    def build(self, width: int) -> "NoFFN":
        """The module, which has no parameters and which the block does not call."""
        return NoFFN()

    def n_parameters(self, width: int) -> int:
        """0."""
        return 0

    def forward_flops(self, width: int, length: int) -> int:
        """0."""
        return 0


class NoFFN(FFN):
    """f(x) = 0: adding it changes nothing, so the block leaves it out."""

    def forward(self, x_BTD: Tensor, seq: Layout) -> tuple[Tensor, Statistics]:
        """(B, T, D) → zeros (B, T, D) and no statistics."""
        return torch.zeros_like(x_BTD), {}
