"""What each token takes from each other one: a mixer's output as a sum over earlier tokens, exactly."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """A mixer's output taken apart by head and by source token.

        output_td = Σ_h Σ_v (Σ_s weight_hts value_shv) · gain_thv · out_hvd + bias_d

    This is an equation, not an estimate: it holds to rounding. Everything is frozen at the given input: weights and
    gains depend on it too.
    weight_BHTS: softmax probabilities, which sum to 1 less what a learned sink takes; or signed implied weights of a
        linear mixer, which are no distribution.
    value_BSHV: what is mixed; of shared heads repeated, of convolved values after the convolution.
    gain_BTHV: factor between a head's output and the output projection, of gates and norms; None for 1.
    out_HVD: the output projection by head.  bias_D: None without one.
    All are kept in the weights' dtype, fp32 at least: a model in 16 bits is explained up to what it rounds.
    """

    weight_BHTS: Tensor
    value_BSHV: Tensor
    gain_BTHV: Tensor | None
    out_HVD: Tensor
    bias_D: Tensor | None

    def __post_init__(self) -> None:
        for name in ("value_BSHV", "gain_BTHV", "out_HVD", "bias_D"):
            tensor = getattr(self, name)
            object.__setattr__(self, name, None if tensor is None else tensor.to(self.weight_BHTS.dtype))

    def heads(self) -> Tensor:
        """What each head gives to the output projection, (B, T, H, V)."""
        return self._gained(self.weight_BHTS)

    def contributions(self) -> Tensor:
        """What each head adds to the output, (B, T, H, D); with the bias their sum is the output."""
        return torch.einsum("bthv,hvd->bthd", self.heads(), self.out_HVD)

    def output(self) -> Tensor:
        """The mixer's output (B, T, D), at tokens that are no padding."""
        return self._projected(self.heads(), self.bias_D)

    def cut(self, edges_TS: Tensor) -> Tensor:
        """What exactly these edges add to the output, (B, T, D): without them it is the output less this.

        edges_TS: bool, (T, S) or (B, T, S) for all heads, or (B, H, T, S), where 1 stands for all.
        """
        edges = edges_TS if edges_TS.ndim == 4 else edges_TS.unsqueeze(-3)
        return self._projected(self._gained(self.weight_BHTS * edges), None)

    def _gained(self, weight_BHTS: Tensor) -> Tensor:
        o_BTHV = torch.einsum("bhts,bshv->bthv", weight_BHTS, self.value_BSHV)
        return o_BTHV if self.gain_BTHV is None else o_BTHV * self.gain_BTHV

    def _projected(self, o_BTHV: Tensor, bias_D: Tensor | None) -> Tensor:
        y_BTD = torch.einsum("bthv,hvd->btd", o_BTHV, self.out_HVD)
        return y_BTD if bias_D is None else y_BTD + bias_D


def by_head(matrix_DX: Tensor, heads: int) -> Tensor:
    """An output projection's matrix (D, H · V) as (H, V, D)."""
    return matrix_DX.unflatten(1, (heads, -1)).permute(1, 2, 0)
