"""The convolution before a mixer: every channel mixes in its own last inputs (a Canon layer, arXiv 2512.17351)."""

import torch
from torch import Tensor, nn

from swamla.model.initial import Initializer, uniform
from swamla.ops.layout import Layout
from swamla.ops.short_conv import short_conv, short_conv_step


class Convolution(nn.Module):
    """x_t + Σ_i w_i ⊙ x_{t−i} over the last `taps` inputs of the document, the token's own included.

    Without an activation, and added to its input, so that a mixer sees both.
    """

    def __init__(self, width: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, taps))

    def initializers(self) -> dict[str, Initializer]:
        """Uniform in ±1 / √taps, as torch's convolutions."""
        return {"weight": uniform(self.weight.shape[1] ** -0.5)}

    def forward(self, x_BTD: Tensor, seq: Layout) -> Tensor:
        """Whole sequences, from the start of each document: (B, T, D) → (B, T, D)."""
        return x_BTD + short_conv(x_BTD, self.weight, seq=seq, activation="none")

    def init_history(self, batch: int, *, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """The empty last inputs, (B, taps − 1, D)."""
        width, taps = self.weight.shape
        return torch.zeros(batch, taps - 1, width, dtype=dtype, device=device)

    def step(self, x_BTD: Tensor, history_BWD: Tensor, seq: Layout) -> Tensor:
        """New tokens (B, T, D) after those in the last inputs, which are updated."""
        return x_BTD + short_conv_step(x_BTD, self.weight, history_BWD, seq, activation="none")
