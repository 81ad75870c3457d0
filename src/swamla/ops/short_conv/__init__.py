"""Causal depthwise convolution of a few taps, then SiLU or nothing, as used before a linear recurrence or any mixer."""

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from swamla.errors import MissingBackendError, UsageError
from swamla.ops.exported import causal_conv
from swamla.ops.fla import packing_of
from swamla.ops.graphs import is_fused
from swamla.ops.layout import Layout
from swamla.ops.short_conv.cpu import convolve_line
from swamla.ops.short_conv.cuda import fla_short_conv, fused_short_conv, obstacle
from swamla.ops.short_conv.reference import Activation, reference_short_conv

BACKENDS = ("auto", "reference", "torch", "fla")


def resolve_backend(
    backend: str, device: torch.device, *, taps: int, dtype: torch.dtype, activation: Activation = "silu"
) -> str:
    """The backend that a name means on a device, for whole rows of this dtype.

    "auto" is "fla" on CUDA in 16 bits where flash-linear-attention convolves correctly, else "torch". Raises UsageError
    for an unknown name and MissingBackendError where "fla" cannot convolve.
    """
    if backend not in BACKENDS:
        raise UsageError(f"backend = {backend!r}: short_conv has {', '.join(map(repr, BACKENDS))}")
    if backend == "fla":
        if dtype.itemsize != 2:
            raise MissingBackendError(f'backend = "fla" takes bf16 or fp16, not {dtype}: use "torch"')
        if (reason := obstacle(device, taps, activation)) is not None:
            raise MissingBackendError(f'backend = "fla" {reason}')
    if backend == "auto":
        fits = device.type == "cuda" and dtype.itemsize == 2
        return "fla" if fits and obstacle(device, taps, activation) is None else "torch"
    return backend


def prepare_conv(seq: Layout, backend: str, *, taps: int, activation: Activation = "silu") -> None:
    """Probe the backend and build the document bounds eagerly, so that the compiled convolution has no graph break."""
    device = seq.position_BT.device
    chosen = resolve_backend(backend, device, taps=taps, dtype=torch.bfloat16, activation=activation)
    if chosen == "fla" and not seq.whole_rows:
        packing_of(seq)


def short_conv(
    x_BTD: Tensor,
    weight_DW: Tensor,
    *,
    seq: Layout | None = None,
    history_BWD: Tensor | None = None,
    activation: Activation = "silu",
    backend: str = "auto",
) -> Tensor:
    """y (B, T, D) = f(Σ_i weight[:, i] x[t − (W − 1) + i]) within each document, in x's dtype.

    activation: f is SiLU, or with "none" the identity. weight[:, −1] multiplies the current token. history_BWD: the
    W − 1 inputs before each row (zeros unless given), in the document of the row's first token. Backends: "reference"
    (a masked sum of shifted inputs), "torch" (hand-written backward; in compiled graphs on a GPU plain tensor code,
    fused into one kernel a pass), "fla" (flash-linear-attention, without history), "auto" (see `resolve_backend`, also
    for what is raised; "reference" for rows of T < 2 W on a CPU).
    """
    if activation not in get_args(Activation):
        raise UsageError(f"activation = {activation!r}: short_conv has {', '.join(map(repr, get_args(Activation)))}")
    taps = weight_DW.shape[-1]
    if torch.compiler.is_exporting():
        return causal_conv(x_BTD, weight_DW, history_BWD, activation)
    chosen = resolve_backend(backend, x_BTD.device, taps=taps, dtype=x_BTD.dtype, activation=activation)
    if history_BWD is None:
        if chosen == "fla":
            return fla_short_conv(x_BTD, weight_DW, seq, activation)
        if chosen == "torch" and is_fused(x_BTD):
            return fused_short_conv(x_BTD, weight_DW, seq, activation)
    if chosen == "reference" or (backend == "auto" and x_BTD.shape[1] < 2 * taps):
        return reference_short_conv(x_BTD, weight_DW, seq, history_BWD, activation)
    return convolve_line(x_BTD, weight_DW, seq, history_BWD, activation)


def short_conv_step(
    x_BTD: Tensor,
    weight_DW: Tensor,
    history_BWD: Tensor,
    seq: Layout,
    *,
    activation: Activation = "silu",
    backend: str = "auto",
) -> Tensor:
    """`short_conv` of new tokens after the last W − 1 inputs of each row, which are updated in place.

    seq: from `Layout.continuing(...)`; padding, at row ends only, does not change the inputs that are kept.
    """
    time, reach = x_BTD.shape[1], weight_DW.shape[-1] - 1
    line_BSD = torch.cat((history_BWD.to(x_BTD.dtype), x_BTD), dim=1)
    if time == 1:  # by the equation: a few operations
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        y_BTD = (line_BSD.to(wide) * weight_DW.T.to(wide)).sum(dim=1, keepdim=True)
        y_BTD = (F.silu(y_BTD) if activation == "silu" else y_BTD).to(x_BTD.dtype)
    else:
        before_BWD = line_BSD[:, :reach]
        y_BTD = short_conv(x_BTD, weight_DW, history_BWD=before_BWD, activation=activation, backend=backend)
    if seq.padded:
        kept_BW = seq.real_BT.sum(dim=1, keepdim=True) + torch.arange(reach, device=x_BTD.device)
        history_BWD.copy_(line_BSD[torch.arange(len(line_BSD), device=x_BTD.device)[:, None], kept_BW])
    else:
        history_BWD.copy_(line_BSD[:, time:])
    return y_BTD
