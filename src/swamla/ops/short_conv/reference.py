"""The short convolution by its definition: one masked, shifted product per tap."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from swamla.ops.layout import Layout

Activation = Literal["silu", "none"]


def reference_short_conv(
    x_BTD: Tensor,
    weight_DW: Tensor,
    seq: Layout | None,
    history_BWD: Tensor | None = None,
    activation: Activation = "silu",
) -> Tensor:
    """y (B, T, D) = f(Σ_i weight[:, i] x[t − (W − 1) + i]) within each document, in fp32 (fp64 for fp64).

    f: SiLU, or with the activation "none" the identity.
    """
    time, taps = x_BTD.shape[1], weight_DW.shape[-1]
    if history_BWD is None:
        history_BWD = x_BTD.new_zeros(x_BTD.shape[0], taps - 1, x_BTD.shape[2])
    dtype = torch.promote_types(x_BTD.dtype, torch.float32)
    line_BSD = torch.cat([history_BWD.to(dtype), x_BTD.to(dtype)], dim=1)
    age_BT = None if seq is None else visible_inputs(seq.position_BT, taps)
    y_BTD = torch.zeros_like(x_BTD, dtype=dtype)
    for tap in range(taps):
        shifted_BTD = line_BSD[:, tap : tap + time]
        if age_BT is not None:
            shifted_BTD = shifted_BTD.masked_fill((age_BT < taps - 1 - tap)[..., None], 0)
        y_BTD = y_BTD + shifted_BTD * weight_DW[:, tap].to(dtype)
    return (F.silu(y_BTD) if activation == "silu" else y_BTD).to(x_BTD.dtype)


def visible_inputs(position_BT: Tensor, taps: int) -> Tensor:
    """How many earlier inputs each token (B, T) may read; the row's first document includes the history."""
    index_T = torch.arange(position_BT.shape[1], device=position_BT.device)
    return torch.where(position_BT < index_T, position_BT, index_T + taps - 1)
