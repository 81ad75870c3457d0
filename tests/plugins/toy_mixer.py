"""A mixer in one file: every token sees the mean of its document so far."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import swamla
from swamla.errors import require
from swamla.model import Mixer, MixerConfig, State
from swamla.ops import Layout


@swamla.register
@dataclass(frozen=True, kw_only=True)
class ToyConfig(MixerConfig):
    """The running mean of projected tokens.

    inner: width of what is averaged, the model's by default.
    """

    kind: ClassVar[str] = "toy"
    sign: ClassVar[str] = "T"
    is_local: ClassVar[bool] = True  # neither its cost nor its state grows with the distance to the document's start
    inner: int | None = None

    def __post_init__(self) -> None:
        require(self.inner is None or self.inner > 0, "inner", self.inner, "must be > 0, e.g. 64")

    @property
    def sees_order(self) -> bool:
        """A mean does not."""
        return False

    def build(self, width: int) -> "Toy":
        """The module."""
        return Toy(width, self.inner or width)

    def n_parameters(self, width: int) -> int:
        """One projection in, one out."""
        return 2 * width * (self.inner or width)

    def forward_flops(self, width: int, length: int) -> int:
        """Those of the projections: a running sum is no matrix product."""
        return 2 * self.n_parameters(width) * length

    def state_bytes(self, width: int, length: int, element_bytes: int) -> int:
        """One sum, in fp32 at least, however long the sequence."""
        return (self.inner or width) * max(4, element_bytes)


@dataclass
class ToyState(State):
    """The sum of all tokens so far, (B, V)."""

    sum_BV: Tensor


class Toy(Mixer[ToyState]):
    """y = W_o · mean of W_v x over the document so far."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.v_proj = nn.Linear(width, inner, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x_BTD: Tensor, seq: Layout) -> Tensor:
        """(B, T, D) → (B, T, D). `seq.runs` are the documents of all rows in turn: none of them sees another."""
        v_NV = self.v_proj(x_BTD).flatten(0, 1)
        wide = torch.promote_types(v_NV.dtype, torch.float32)  # under autocast sums of bf16 would lose what they add
        parts = zip(v_NV.split([count * length for count, length in seq.runs]), seq.runs, strict=True)
        sums_NV = torch.cat([part.unflatten(0, run).cumsum(1, dtype=wide).flatten(0, 1) for part, run in parts])
        mean_BTV = sums_NV.view(*x_BTD.shape[:2], -1) / (seq.position_BT + 1)[..., None]
        return self.o_proj(mean_BTV.to(v_NV.dtype))

    def init_state(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str) -> ToyState:
        """Nothing has been seen."""
        dtype = torch.promote_types(dtype, torch.float32)
        return ToyState(torch.zeros(batch, self.v_proj.out_features, dtype=dtype, device=device))

    def step(self, x_BTD: Tensor, state: ToyState, seq: Layout) -> Tensor:
        """New tokens (B, T, D) after those summed up in `state`, which is updated; padding may hold anything."""
        v_BTV = self.v_proj(x_BTD.where(seq.real_BT[..., None], 0))
        sums_BTV = state.sum_BV[:, None] + v_BTV.cumsum(1)
        state.sum_BV.copy_(sums_BTV[:, -1])
        return self.o_proj((sums_BTV / (seq.position_BT + 1)[..., None]).to(v_BTV.dtype))
