"""What every feed-forward network offers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from swamla.ops.layout import Layout

Statistics = dict[str, Tensor]
"""What an FFN tells of a forward pass, by name, all summed over tokens: micro-batches and ranks add up.

Padding is no token: it counts in none of them.

loss: nats to add to the cross-entropy.  load: tokens each expert was given, (E,).  entropy: of the router, in nats.
tokens: how many were routed.
"""


class FFN(nn.Module, ABC):
    """Works on every token alone."""

    @abstractmethod
    def forward(self, x_BTD: Tensor, seq: Layout) -> tuple[Tensor, Statistics]:
        """(B, T, D) → (B, T, D), and statistics; none for a network without a router. `seq` says what is padding."""

    def own_experts(self, mesh: Any) -> list[nn.Parameter]:
        """Keep only the experts that this process owns, see `Experts.own`; the parameters that are cut, if any."""
        return []

    def rebalance(self, statistics: Mapping[str, Tensor]) -> None:
        """After an optimizer step: move what balances the experts, given the statistics of the whole batch."""
