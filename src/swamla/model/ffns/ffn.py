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
"""Statistics of an FFN's forward pass by name: sums over tokens without padding, to be summed over micro-batches and
ranks.

loss: added to the cross-entropy, in nats.  load: tokens of each expert, (E,).  entropy: of the router's scores.
tokens: number of routed tokens.
"""


@dataclass(frozen=True, kw_only=True)
class FFNConfig(Registered, home="swamla.model.ffns"):
    """The contract of an FFN's config: abstract methods are required, the others have defaults.

    sign, style: the letter that stands for the FFN in drawings, and that letter's rich style.
    outputs: the module's parameters that write to the residual stream; their initial weights are scaled by depth.
    vectors: two-dimensional parameters that are a set of vectors and not the matrix of a linear map, such as a
        router's, one per expert. Muon leaves them to AdamW, and their layer is not converted to fp8.
    only_projects: whether the module does nothing with its input but multiply it by matrices. Autocast rounds it for
        these products, so the block may round it before.
    is_absent: whether there is no FFN: the block then neither calls the module nor has a norm for it.
    BACKENDS: what the field `backend` may be, "auto" included; empty for an FFN without that field.
    """

    sign: ClassVar[str] = "?"
    style: ClassVar[str] = "bold"
    outputs: ClassVar[tuple[str, ...]] = ("down_proj.weight",)
    vectors: ClassVar[tuple[str, ...]] = ()
    only_projects: ClassVar[bool] = False
    is_absent: ClassVar[bool] = False
    BACKENDS: ClassVar[tuple[str, ...]] = ()

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
        """Widths inside the module that follow from the model's width, by name, to be printed."""
        return {}

    def projections(self, width: int) -> Mapping[str, Mapping[str, int]]:
        """The logical projections that a matrix of the module fuses, in order: parameter → name → outputs.

        Low-rank adapters are apart for each; a matrix that is not named here is one projection.
        """
        return {}

    def backends(self, device: torch.device, width: int, dtype: torch.dtype) -> dict[str, str]:
        """Op → backend on `device` in a model of `width` that computes in `dtype`; may be empty.

        Raises `MissingBackendError` for a configured backend that cannot compute the op there.
        """
        return {}


class FFN(nn.Module, ABC):
    """Maps each token by itself."""

    @abstractmethod
    def forward(self, x_BTD: Tensor, seq: Layout) -> tuple[Tensor, Statistics]:
        """(B, T, D) → (B, T, D), and statistics (empty without a router). `seq.real_BT` is False for padding."""

    def shard_experts(self, mesh: Any) -> list[nn.Parameter]:
        """Shard the experts over ranks, see `Experts.shard`; returns the sharded parameters, if any."""
        return []

    def balance(self) -> Tensor | None:
        """The router bias (E,) that balances the experts' load; None without one."""
        return None

    def rebalance(self, statistics: Mapping[str, Tensor]) -> None:
        """After an optimizer step: update the router bias by the statistics of the whole batch."""
