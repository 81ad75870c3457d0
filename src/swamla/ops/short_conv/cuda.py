"""The short convolution on CUDA: flash-linear-attention's kernels, or plain tensor code for the compiler.

Left to the compiler, the derivative of `reference_short_conv` moves three times the bytes: every shift becomes a tensor
of zeros that a slice is added to. Not measured on GPU.
"""

from collections.abc import Iterable
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swamla.ops import fla, libraries
from swamla.ops.graphs import in_dtype_of
from swamla.ops.layout import Layout
from swamla.ops.short_conv.reference import Activation, reference_short_conv

WIDTH = 256  # channels of the probe: Triton's tuning does not depend on how many there are


def fused_short_conv(x_BTD: Tensor, weight_DW: Tensor, seq: Layout | None, activation: Activation) -> Tensor:
    """`short_conv` without history: (B, T, D)."""
    position_BT = None if seq is None else seq.position_BT
    return _FusedShortConv.apply(x_BTD, weight_DW, _ages(x_BTD, position_BT), activation == "silu")


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
    return F.pad(age_BT, (0, -shift), value=0)[:, -shift:]  # in this order also for rows shorter than the shift


class _FusedShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, weight_DW: Tensor, age_BT: Tensor, silu: bool) -> Tensor:
        ctx.save_for_backward(x_BTD, weight_DW, age_BT)
        ctx.silu = silu
        wide_DW = weight_DW.to(torch.promote_types(x_BTD.dtype, torch.float32))
        y_BTD = _summed(x_BTD, wide_DW, age_BT, back=False)
        return in_dtype_of(x_BTD, F.silu(y_BTD) if silu else y_BTD)

    @staticmethod
    def backward(ctx: Any, dy_BTD: Tensor) -> tuple[Tensor | None, ...]:
        """d = dy · f'(y) in x's dtype, dx its convolution backwards, dw its products."""
        x_BTD, weight_DW, age_BT = ctx.saved_tensors
        wide_DW = weight_DW.to(torch.promote_types(x_BTD.dtype, torch.float32))
        d_BTD = dy_BTD
        if ctx.silu:
            y_BTD = _summed(x_BTD, wide_DW, age_BT, back=False)
            gate_BTD = y_BTD.sigmoid()
            d_BTD = dy_BTD * gate_BTD * (1 + y_BTD * (1 - gate_BTD))
        d_BTD = d_BTD.to(x_BTD.dtype)
        dx_BTD = _summed(d_BTD, wide_DW, age_BT, back=True).to(x_BTD.dtype)
        taps, columns = weight_DW.shape[1], []
        for i in reversed(range(taps)):
            shifted_BTD = x_BTD.roll(i, 1).where((age_BT >= i)[..., None], 0) if i else x_BTD
            columns.append((d_BTD.to(wide_DW.dtype) * shifted_BTD.to(wide_DW.dtype)).sum((0, 1)))
        return dx_BTD, torch.stack(columns, dim=1).to(weight_DW.dtype), None, None


def obstacle(device: torch.device, taps: int, activation: Activation = "silu") -> str | None:
    """Why "fla" cannot convolve on `device`, to follow the word "fla"; None if it can.

    Runs the kernels once at the size of a training step and compares outputs and gradients with the reference.
    """
    kernels = ("short_conv", str(taps), activation)
    return fla.obstacle(device, kernels, partial(_probe, taps=taps, activation=activation))


@torch.inference_mode(False)  # generation, in inference mode, may be the first caller
def _probe(device: str, taps: int, activation: Activation) -> str | None:
    generator = torch.Generator().manual_seed(0)
    wide_BTD = torch.randn(fla.PROBE_ROWS, fla.PROBE_LENGTH, 2 * WIDTH, generator=generator).to(device).bfloat16()
    weight_DW = torch.randn(WIDTH, taps, generator=generator).to(device)
    inputs = [wide_BTD[..., :WIDTH], weight_DW]  # as in the mixer, the input is a slice of a wider tensor
    packed = fla.probe_layout(device)
    return libraries.judged(partial(_compared, inputs, (None, packed), activation), fla.INSTEAD)


def _compared(
    inputs: list[Tensor], layouts: Iterable[Layout | None], activation: Activation
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of these kernels, and those of the reference in fp32."""
    results: tuple[list[Tensor], list[Tensor]] = [], []
    for seq, precise in product(layouts, (False, True)):
        leaves = [(x.float() if precise else x).detach().requires_grad_() for x in inputs]
        compute = reference_short_conv if precise else fla_short_conv
        with torch.enable_grad(), torch.autocast(inputs[0].device.type, enabled=False):
            y = compute(leaves[0], leaves[1], seq, activation=activation)
            results[precise].extend([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    return results


def fla_short_conv(x_BTD: Tensor, weight_DW: Tensor, seq: Layout | None, activation: Activation) -> Tensor:
    """`short_conv` without history, in 16 bits: (B, T, D)."""
    packing = None if seq is None or seq.whole_rows else fla.packing_of(seq)
    bounds = (None, None) if packing is None else (packing.bounds_M, packing.host_bounds_M)
    return torch.ops.swamla.fla_short_conv(x_BTD, weight_DW.to(x_BTD.dtype), *bounds, activation)


@torch.library.custom_op("swamla::fla_short_conv", mutates_args=())
def _forward(
    x_BTD: Tensor, weight_DW: Tensor, bounds_M: Tensor | None, host_bounds_M: Tensor | None, activation: str
) -> Tensor:
    y, _ = import_module("fla.modules.causal_conv1d").causal_conv1d_fwd(
        x=_line(x_BTD, bounds_M),
        weight=weight_DW,
        bias=None,
        residual=None,
        **_options(bounds_M, host_bounds_M, activation),
    )
    return y.view(x_BTD.shape)


@torch.library.custom_op("swamla::fla_short_conv_backward", mutates_args=())
def _backward(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bounds_M: Tensor | None,
    host_bounds_M: Tensor | None,
    activation: str,
    dy_BTD: Tensor,
) -> tuple[Tensor, Tensor]:
    dx, dw, *_ = import_module("fla.modules.causal_conv1d").causal_conv1d_bwd(
        x=_line(x_BTD, bounds_M),
        dy=_line(dy_BTD.contiguous(), bounds_M),
        dht=None,
        weight=weight_DW,
        bias=None,
        residual=None,
        **_options(bounds_M, host_bounds_M, activation),
    )
    return dx.contiguous().view(x_BTD.shape), dw.to(weight_DW.dtype)


def _line(x_BTD: Tensor, bounds_M: Tensor | None) -> Tensor:
    """Packed rows as one row, which the bounds of documents refer to."""
    return x_BTD.contiguous() if bounds_M is None else x_BTD.contiguous().flatten(0, 1)[None]


def _options(bounds_M: Tensor | None, host_bounds_M: Tensor | None, activation: str) -> dict[str, Any]:
    documents = {} if bounds_M is None else {"cu_seqlens": bounds_M, "cu_seqlens_cpu": host_bounds_M}
    return {"activation": activation if activation == "silu" else None, **documents}


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy_BTD: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.swamla.fla_short_conv_backward(*ctx.saved_tensors, ctx.activation, dy_BTD)
    return (*gradients, None, None, None)


_forward.register_fake(lambda x_BTD, *_: torch.empty_like(x_BTD, memory_format=torch.contiguous_format))
_backward.register_fake(
    lambda x_BTD, weight_DW, *_: (
        torch.empty_like(x_BTD, memory_format=torch.contiguous_format),
        torch.empty_like(weight_DW),
    )
)
_forward.register_autograd(_gradients, setup_context=_keep)
