"""The short convolution as plain tensor code for a GPU's compiler, which makes one kernel of each pass.

Left to the compiler, the derivative of `reference_short_conv` moves three times the bytes: every shift becomes a tensor
of zeros that a slice is added to. Not measured on GPU.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swamla.ops.graphs import in_dtype_of
from swamla.ops.layout import Layout


def fused_short_conv(x_BTD: Tensor, weight_DW: Tensor, seq: Layout | None) -> Tensor:
    """`short_conv` without history: (B, T, D)."""
    position_BT = None if seq is None else seq.position_BT
    return _FusedShortConv.apply(x_BTD, weight_DW, _ages(x_BTD, position_BT))


def _ages(x_BTD: Tensor, position_BT: Tensor | None) -> Tensor:
    """(B or 1, T): how many inputs before each token it may see."""
    index_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
    return index_T[None] if position_BT is None else torch.minimum(position_BT, index_T)


def _summed(x_BTD: Tensor, weight_DW: Tensor, age_BT: Tensor, *, back: bool) -> Tensor:
    """Σ_i w[W − 1 − i] x[t − i] over the inputs that t may see; `back`: x[t + i], over the tokens that may see t."""
    taps = weight_DW.shape[1]
    y_BTD = None
    for i in range(taps):
        shifted_BTD = x_BTD.to(weight_DW.dtype)
        if i:  # what comes around from the other end is masked, too
            shift = -i if back else i
            seen_BT = _shifted(age_BT, -i) >= i if back else age_BT >= i
            shifted_BTD = shifted_BTD.roll(shift, 1).where(seen_BT[..., None], 0)
        product_BTD = shifted_BTD * weight_DW[:, taps - 1 - i]
        y_BTD = product_BTD if y_BTD is None else y_BTD + product_BTD
    assert y_BTD is not None
    return y_BTD


def _shifted(age_BT: Tensor, shift: int) -> Tensor:
    """Ages of the tokens behind; beyond the row's end nobody sees anything."""
    return F.pad(age_BT[:, -shift:], (0, -shift), value=0)


class _FusedShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, weight_DW: Tensor, age_BT: Tensor) -> Tensor:
        ctx.save_for_backward(x_BTD, weight_DW, age_BT)
        wide_DW = weight_DW.to(torch.promote_types(x_BTD.dtype, torch.float32))
        return in_dtype_of(x_BTD, F.silu(_summed(x_BTD, wide_DW, age_BT, back=False)))

    @staticmethod
    def backward(ctx: Any, dy_BTD: Tensor) -> tuple[Tensor | None, ...]:
        """d = dy · silu'(y) in x's dtype, dx its convolution backwards, dw its products."""
        x_BTD, weight_DW, age_BT = ctx.saved_tensors
        wide_DW = weight_DW.to(torch.promote_types(x_BTD.dtype, torch.float32))
        y_BTD = _summed(x_BTD, wide_DW, age_BT, back=False)
        gate_BTD = y_BTD.sigmoid()
        d_BTD = (dy_BTD * gate_BTD * (1 + y_BTD * (1 - gate_BTD))).to(x_BTD.dtype)
        dx_BTD = _summed(d_BTD, wide_DW, age_BT, back=True).to(x_BTD.dtype)
        taps, columns = weight_DW.shape[1], []
        for i in reversed(range(taps)):
            shifted_BTD = x_BTD.roll(i, 1).where((age_BT >= i)[..., None], 0) if i else x_BTD
            columns.append((d_BTD.to(wide_DW.dtype) * shifted_BTD.to(wide_DW.dtype)).sum((0, 1)))
        return dx_BTD, torch.stack(columns, dim=1).to(weight_DW.dtype), None
