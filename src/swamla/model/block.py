"""One layer: a sequence mixer, then an FFN, each behind a norm and added to the residual stream."""

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from swamla.model.ffns.dense import DenseConfig
from swamla.model.ffns.ffn import FFN, Statistics
from swamla.model.mixers.gdn import GDNConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.mixers.mixer import Mixer, State
from swamla.model.mixers.mla import MLAConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.model.norm import NormConfig
from swamla.ops.layout import Layout

MixerConfig = MHAConfig | SWAConfig | MLAConfig | GDNConfig
FFNConfig = DenseConfig


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """What one layer is made of."""

    mixer: MixerConfig
    ffn: FFNConfig = field(default_factory=DenseConfig)

    def build(self, width: int, norm: NormConfig, dropout: float) -> "Block":
        """The module."""
        return Block(self, width, norm, dropout)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: BlockConfig, width: int, norm: NormConfig, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.mixer_norm = norm.build(width)
        self.mixer: Mixer = config.mixer.build(width)
        self.ffn_norm = norm.build(width)
        self.ffn: FFN = config.ffn.build(width)

    def forward(self, x_BTD: Tensor, seq: Layout) -> tuple[Tensor, Statistics]:
        """(B, T, D) → (B, T, D) and the FFN's statistics."""
        x_BTD = x_BTD + self._drop(self.mixer(self.mixer_norm(x_BTD), seq))
        y_BTD, statistics = self.ffn(self.ffn_norm(x_BTD))
        return x_BTD + self._drop(y_BTD), statistics

    def step(self, x_BTD: Tensor, state: State, seq: Layout) -> Tensor:
        """New tokens (B, T, D) after those in `state`, which is updated. Never drops anything out."""
        x_BTD = x_BTD + self.mixer.step(self.mixer_norm(x_BTD), state, seq)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))[0]

    def _drop(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(x_BTD, self.dropout, self.training) if self.dropout else x_BTD
