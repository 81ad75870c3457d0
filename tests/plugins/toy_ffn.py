"""An FFN in one file: squared ReLU (arXiv 2109.08668)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

import swamla
from swamla.errors import require
from swamla.model import FFN, FFNConfig, Statistics
from swamla.ops import Layout


@swamla.register
@dataclass(frozen=True, kw_only=True)
class ToyFFNConfig(FFNConfig):
    """W_down relu(W_up x)².

    hidden: hidden width.
    """

    kind: ClassVar[str] = "toy_ffn"
    sign: ClassVar[str] = "q"
    hidden: int = 64

    def __post_init__(self) -> None:
        require(self.hidden > 0, "hidden", self.hidden, "must be > 0, e.g. 64")

    def build(self, width: int) -> "ToyFFN":
        """The module."""
        return ToyFFN(width, self.hidden)

    def n_parameters(self, width: int) -> int:
        """Up and down."""
        return 2 * width * self.hidden

    def forward_flops(self, width: int, length: int) -> int:
        """A multiplication and an addition for each parameter and token."""
        return 2 * self.n_parameters(width) * length


class ToyFFN(FFN):
    """W_down relu(W_up x)²."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Tensor, seq: Layout) -> tuple[Tensor, Statistics]:
        """(B, T, D) → (B, T, D), and no statistics."""
        return self.down_proj(self.up_proj(x_BTD).relu().square()), {}
