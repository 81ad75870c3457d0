"""The dense feed-forward network: SwiGLU (arXiv 2002.05202), GELU (as in GPT-2) or ReLU² (arXiv 2109.08668)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from swamla.errors import require
from swamla.model.ffns.ffn import FFN, FFNConfig, Statistics
from swamla.ops.layout import Layout
from swamla.ops.swiglu import swiglu
from swamla.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class DenseConfig(FFNConfig):
    """A dense feed-forward network.

    hidden: hidden width; by default 8/3 of the width, rounded up to a multiple of 64 (SwiGLU), or 4 times it.
    activation: swiglu, gelu as in GPT-2, or relu2, the square of ReLU (arXiv 2109.08668).
    bias: whether projections have one.
    """

    kind: ClassVar[str] = "dense"
    sign: ClassVar[str] = "d"
    style: ClassVar[str] = "dim"
    only_projects: ClassVar[bool] = True
    hidden: int | None = None
    activation: Literal["swiglu", "gelu", "relu2"] = "swiglu"
    bias: bool = False

    def __post_init__(self) -> None:
        require(self.hidden is None or self.hidden > 0, "hidden", self.hidden, "must be > 0, e.g. 1024")

    def hidden_dim(self, width: int) -> int:
        """Hidden width in a model of `width`."""
        if self.hidden is not None:
            return self.hidden
        return (8 * width + 191) // 192 * 64 if self.activation == "swiglu" else 4 * width

    @property
    def inputs(self) -> int:
        """Input matrices: W_up, and W_gate of SwiGLU."""
        return 2 if self.activation == "swiglu" else 1

    def build(self, width: int) -> FFN:
        """The module."""
        return SwiGLU(self, width) if self.activation == "swiglu" else Ungated(self, width)

    def widths(self, width: int) -> dict[str, int]:
        """The hidden width."""
        return {"hidden": self.hidden_dim(width)}

    def projections(self, width: int) -> dict[str, dict[str, int]]:
        """Gate and up of SwiGLU."""
        hidden = self.hidden_dim(width)
        return {"gate_up_proj.weight": {"gate": hidden, "up": hidden}} if self.activation == "swiglu" else {}

    def n_parameters(self, width: int) -> int:
        """Parameters of the module."""
        hidden = self.hidden_dim(width)
        return (self.inputs + 1) * width * hidden + self.bias * (self.inputs * hidden + width)

    def forward_flops(self, width: int, length: int) -> int:
        """Floating-point operations of one forward pass over `length` tokens."""
        return 2 * (self.inputs + 1) * width * self.hidden_dim(width) * length


class SwiGLU(FFN):
    """W_down (SiLU(W_gate x) ⊙ W_up x), gate and up fused into one projection."""

    def __init__(self, config: DenseConfig, width: int) -> None:
        super().__init__()
        hidden = config.hidden_dim(width)
        self.gate_up_proj = nn.Linear(width, 2 * hidden, bias=config.bias)
        self.down_proj = nn.Linear(hidden, width, bias=config.bias)

    def forward(self, x_BTD: Tensor, seq: Layout) -> tuple[Tensor, Statistics]:
        """(B, T, D) → (B, T, D) and no statistics."""
        return self.down_proj(swiglu(self.gate_up_proj(x_BTD))), {}


def gelu(x: Tensor) -> Tensor:
    """GELU with the tanh approximation that GPT-2 uses."""
    return F.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)²."""
    return F.relu(x).square()


class Ungated(FFN):
    """W_down f(W_up x), with f the GELU or the squared ReLU."""

    def __init__(self, config: DenseConfig, width: int) -> None:
        super().__init__()
        hidden = config.hidden_dim(width)
        self.activation = {"gelu": gelu, "relu2": relu2}[config.activation]
        self.up_proj = nn.Linear(width, hidden, bias=config.bias)
        self.down_proj = nn.Linear(hidden, width, bias=config.bias)

    def forward(self, x_BTD: Tensor, seq: Layout) -> tuple[Tensor, Statistics]:
        """(B, T, D) → (B, T, D) and no statistics."""
        return self.down_proj(self.activation(self.up_proj(x_BTD))), {}
