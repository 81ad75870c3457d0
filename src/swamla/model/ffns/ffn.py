"""The FFN contract: a config with exact counts, and a module."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swamla.ops.layout import Layout
from swamla.registry import Registered

Statistics = dict[str, Tensor]
"""Statistics of an FFN's forward pass by name, summed over tokens without padding; micro-batches and ranks add up.

loss: nats to add to the cross-entropy.  load: tokens per expert, (E,).  entropy: of the router, in nats.
tokens: how many were routed.
"""


@dataclass(frozen=True, kw_only=True)
class FFNConfig(Registered, home="swamla.model.ffns"):
    """The contract of an FFN's config: abstract methods are required, the others have defaults.

    sign, style: the letter for it in drawings, and rich's style of that letter.
    outputs: the module's parameters that write to the residual stream; their initial weights are scaled by depth.
    vectors: parameters with two dimensions that are a set of vectors rather than a matrix of activations, such as a
        router's, one per expert. Muon leaves them to AdamW, and fp8 leaves their layer alone.
    """

    sign: ClassVar[str] = "?"
    style: ClassVar[str] = "bold"
    outputs: ClassVar[tuple[str, ...]] = ("down_proj.weight",)
    vectors: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def build(self, width: int) -> "FFN":
        """The module, for a model of `width`."""

    @abstractmethod
    def n_parameters(self, width: int) -> int:
        """Parameters of the module. Raises `ConfigError` for settings that do not fit the width."""

    @abstractmethod
    def forward_flops(self, width: int, length: int) -> int:
        """Floating-point operations, of matrix products, of one forward pass over `length` tokens."""

    def n_active_parameters(self, width: int) -> int:
        """Parameters that one token uses: all."""
        return self.n_parameters(width)

    def components(self, width: int) -> dict[str, int]:
        """Parameters by component; `n_parameters` is their sum."""
        return {self.kind: self.n_parameters(width)}

    def widths(self, width: int) -> dict[str, int]:
        """Widths inside the module that derive from the model's, by name, to be printed."""
        return {}

    def backends(self, device: torch.device) -> dict[str, str]:
        """Op → backend that computes it on `device`; may be empty. Raises `MissingBackendError` where it cannot."""
        return {}


class FFN(nn.Module, ABC):
    """Works on every token alone."""

    @abstractmethod
    def forward(self, x_BTD: Tensor, seq: Layout) -> tuple[Tensor, Statistics]:
        """(B, T, D) → (B, T, D), and statistics; none for a network without a router. `seq` says what is padding."""

    def shard_experts(self, mesh: Any) -> list[nn.Parameter]:
        """Keep only this rank's experts, see `Experts.shard`; returns the sharded parameters, if any."""
        return []

    def balance(self) -> Tensor | None:
        """The bias (E,) that balances the experts, None without one."""
        return None

    def rebalance(self, statistics: Mapping[str, Tensor]) -> None:
        """After an optimizer step: balance the experts by the statistics of the whole batch."""
