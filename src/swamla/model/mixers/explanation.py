"""What each token takes from each other one: a mixer's output as a sum over earlier tokens, exactly."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

PART_BYTES = 2**28  # what the weights of a block of heads may take; those of a single head may take more


class Weights:
    """A mixer's weights, computed when they are asked for: of all heads, or of as many as `PART_BYTES` holds.

    compute: the weights (B, h, T, S) of a slice of the heads.  shape: (B, H, T, S).
    """

    def __init__(self, compute: Callable[[slice], Tensor], shape: tuple[int, int, int, int]) -> None:
        self.shape = shape
        self._compute, self._grad = compute, torch.is_grad_enabled()  # as where the mixer was explained

    @classmethod
    def of(cls, weight_BHTS: Tensor) -> "Weights":
        """Weights that are there already."""
        batch, heads, time, sources = weight_BHTS.shape
        return cls(lambda part: weight_BHTS[:, part], (batch, heads, time, sources))

    @cached_property
    def all(self) -> Tensor:
        """Of all heads, (B, H, T, S), and kept."""
        return self._of(slice(0, self.shape[1]))

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of heads, which they are and their weights (B, h, T, S): a single block where all of them fit."""
        batch, heads, time, sources = self.shape
        whole = "all" in self.__dict__
        for part in [slice(0, heads)] if whole else head_parts(heads, batch * time * sources):
            yield part, self.all if part == slice(0, heads) else self._of(part)

    def _of(self, heads: slice) -> Tensor:
        with torch.set_grad_enabled(self._grad):
            return self._compute(heads)


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """A mixer's output taken apart by head and by source token.

        output_td = Σ_h Σ_v (Σ_s weight_hts value_shv) · gain_thv · out_hvd + bias_d

    This is an equation, not an estimate: it holds to rounding. Everything is frozen at the given input: weights and
    gains depend on it too.
    weights: `weight_BHTS`, or some heads at a time.  weight_BHTS: softmax probabilities, which sum to 1 less what a
        learned sink takes; or signed implied weights of a linear mixer, which are no distribution.
    value_BSHV: what is mixed; of shared heads repeated, of convolved values after the convolution.
    gain_BTHV: factor between a head's output and the output projection, of gates and norms; None for 1.
    out_HVD: the output projection by head.  bias_D: None without one.
    All are kept in the weights' dtype, fp32 at least: a model in 16 bits is explained up to what it rounds.
    """

    weights: Weights
    value_BSHV: Tensor
    gain_BTHV: Tensor | None
    out_HVD: Tensor
    bias_D: Tensor | None

    def __post_init__(self) -> None:
        dtype = torch.promote_types(self.value_BSHV.dtype, torch.float32)
        for name in ("value_BSHV", "gain_BTHV", "out_HVD", "bias_D"):
            tensor = getattr(self, name)
            object.__setattr__(self, name, None if tensor is None else tensor.to(dtype))

    @property
    def weight_BHTS(self) -> Tensor:
        """The weights of all heads at once: B · H · T² numbers."""
        return self.weights.all

    def heads(self) -> Tensor:
        """What each head gives to the output projection, (B, T, H, V)."""
        return self._gained(None)

    def contributions(self) -> Tensor:
        """What each head adds to the output, (B, T, H, D); with the bias their sum is the output."""
        return torch.einsum("bthv,hvd->bthd", self.heads(), self.out_HVD)

    def contribution_parts(self) -> Iterator[Tensor]:
        """`contributions` of blocks of heads that take `PART_BYTES` at most, (B, T, h, D) each."""
        o_BTHV = self.heads()
        batch, time, heads, _ = o_BTHV.shape
        for part in head_parts(heads, batch * time * self.out_HVD.shape[2]):
            yield torch.einsum("bthv,hvd->bthd", o_BTHV[:, :, part], self.out_HVD[part])

    def output(self) -> Tensor:
        """The mixer's output (B, T, D), at tokens that are no padding."""
        return self._projected(self.heads(), self.bias_D)

    def cut(self, edges_TS: Tensor) -> Tensor:
        """What exactly these edges add to the output, (B, T, D): without them it is the output less this.

        edges_TS: bool, (T, S) or (B, T, S) for all heads, or (B, H, T, S), where 1 stands for all.
        """
        return self._projected(self._gained(edges_TS if edges_TS.ndim == 4 else edges_TS.unsqueeze(-3)), None)

    def _gained(self, edges: Tensor | None) -> Tensor:
        o_BTHV = mixed(self.weights, self.value_BSHV, edges)
        return o_BTHV if self.gain_BTHV is None else o_BTHV * self.gain_BTHV

    def _projected(self, o_BTHV: Tensor, bias_D: Tensor | None) -> Tensor:
        y_BTD = torch.einsum("bthv,hvd->btd", o_BTHV, self.out_HVD)
        return y_BTD if bias_D is None else y_BTD + bias_D


def head_parts(heads: int, numbers: int) -> list[slice]:
    """Blocks of heads, each of which has so many numbers of 8 bytes, that take `PART_BYTES`; one head at least."""
    size = max(1, PART_BYTES // (8 * numbers))
    return [slice(begin, min(begin + size, heads)) for begin in range(0, heads, size)]


def mixed(weights: Weights, value_BSHV: Tensor, edges: Tensor | None = None) -> Tensor:
    """Each head's weighted sum of values, (B, T, H, V), over some edges or all.

    edges: bool, (…, T, S), or with heads (…, H, T, S), where 1 stands for all.
    """
    parts = []
    for heads, weight_BHTS in weights.parts():
        if edges is not None:
            weight_BHTS = weight_BHTS * (edges if edges.shape[-3] == 1 else edges[..., heads, :, :])
        parts.append(torch.einsum("bhts,bshv->bthv", weight_BHTS, value_BSHV[:, :, heads].to(weight_BHTS.dtype)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def by_head(matrix_DX: Tensor, heads: int) -> Tensor:
    """An output projection's matrix (D, H · V) as (H, V, D)."""
    return matrix_DX.unflatten(1, (heads, -1)).permute(1, 2, 0)
