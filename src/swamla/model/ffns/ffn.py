"""What every feed-forward network offers: its config, counts included, and its module."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swamla.ops.layout import Layout
from swamla.registry import Registered

Statistics = dict[str, Tensor]
"""What an FFN tells of a forward pass, by name, all summed over tokens: micro-batches and ranks add up.

Padding is no token: it counts in none of them.

loss: nats to add to the cross-entropy.  load: tokens each expert was given, (E,).  entropy: of the router, in nats.
tokens: how many were routed.
"""


@dataclass(frozen=True, kw_only=True)
class FFNConfig(Registered, home="swamla.model.ffns"):
    """What the config of an FFN has to offer, and below it what it may.

    sign, style: the letter that stands for it in drawings, and rich's style of that letter.
    outputs: the module's parameters that write to the residual stream, which start smaller the deeper the model.
    vectors: those with two dimensions that map no activations but are vectors side by side, as a router's are, one an
        expert: Muon leaves them to AdamW, and a layer with such a weight does not multiply in fp8.
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
        """Parameters by what they are; `n_parameters` is their sum."""
        return {self.kind: self.n_parameters(width)}

    def widths(self, width: int) -> dict[str, int]:
        """Widths inside the module that follow from the model's, for people."""
        return {}

    def backends(self, device: torch.device) -> dict[str, str]:
        """What computes which op on `device`, empty for none with a choice; `MissingBackendError` for what cannot."""
        return {}


class FFN(nn.Module, ABC):
    """Works on every token alone."""

    @abstractmethod
    def forward(self, x_BTD: Tensor, seq: Layout) -> tuple[Tensor, Statistics]:
        """(B, T, D) → (B, T, D), and statistics; none for a network without a router. `seq` says what is padding."""

    def own_experts(self, mesh: Any) -> list[nn.Parameter]:
        """Keep only the experts that this process owns, see `Experts.own`; the parameters that are cut, if any."""
        return []

    def balance(self) -> Tensor | None:
        """The bias (E,) by which the experts are balanced; None where there is none."""
        return None

    def rebalance(self, statistics: Mapping[str, Tensor]) -> None:
        """After an optimizer step: move what balances the experts, given the statistics of the whole batch."""
