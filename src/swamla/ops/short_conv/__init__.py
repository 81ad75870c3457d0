"""Causal depthwise convolution of a few taps, then SiLU, as used before a linear recurrence."""

import torch
from torch import Tensor

from swamla.errors import MissingBackendError, UsageError
from swamla.ops.fla import packing_of
from swamla.ops.graphs import is_fused
from swamla.ops.layout import Layout
from swamla.ops.short_conv.cpu import convolve_line
from swamla.ops.short_conv.cuda import fla_short_conv, fused_short_conv, obstacle
from swamla.ops.short_conv.reference import reference_short_conv

BACKENDS = ("auto", "reference", "torch", "fla")


def resolve_backend(backend: str, device: torch.device, *, taps: int, dtype: torch.dtype) -> str:
    """The backend that a name means on a device, for whole rows of this dtype.

    "auto" is "fla" on CUDA in 16 bits where flash-linear-attention convolves correctly, else "torch". Raises UsageError
    for an unknown name and MissingBackendError where "fla" cannot convolve.
    """
    if backend not in BACKENDS:
        raise UsageError(f"backend = {backend!r}: short_conv has {', '.join(map(repr, BACKENDS))}")
    if backend == "fla":
        if dtype.itemsize != 2:
            raise MissingBackendError(f'backend = "fla" takes bf16 or fp16, not {dtype}: use "torch"')
        if (reason := obstacle(device, taps)) is not None:
            raise MissingBackendError(f'backend = "fla" {reason}')
    if backend == "auto":
        fits = device.type == "cuda" and dtype.itemsize == 2
        return "fla" if fits and obstacle(device, taps) is None else "torch"
    return backend


def prepare_conv(seq: Layout, backend: str, *, taps: int) -> None:
    """Probe the backend and build the document bounds eagerly, so that the compiled convolution has no graph break."""
    chosen = resolve_backend(backend, seq.position_BT.device, taps=taps, dtype=torch.bfloat16)
    if chosen == "fla" and not seq.whole_rows:
        packing_of(seq)


def short_conv(
    x_BTD: Tensor,
    weight_DW: Tensor,
    *,
    seq: Layout | None = None,
    history_BWD: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y (B, T, D) = silu(Σ_i weight[:, i] x[t − (W − 1) + i]) within each document, in x's dtype.

    weight[:, −1] multiplies the current token. history_BWD: the W − 1 inputs before each row (zeros unless given), in
    the document of the row's first token. Backends: "reference" (a masked sum of shifted inputs), "torch" (hand-written
    backward; in compiled graphs on a GPU plain tensor code, fused into one kernel a pass), "fla"
    (flash-linear-attention, without history), "auto" (see `resolve_backend`, also for what is raised; "reference" for
    rows of T < 2 W on a CPU).
    """
    taps = weight_DW.shape[-1]
    chosen = resolve_backend(backend, x_BTD.device, taps=taps, dtype=x_BTD.dtype)
    if history_BWD is None:
        if chosen == "fla":
            return fla_short_conv(x_BTD, weight_DW, seq)
        if chosen == "torch" and is_fused(x_BTD):
            return fused_short_conv(x_BTD, weight_DW, seq)
    if chosen == "reference" or (backend == "auto" and x_BTD.shape[1] < 2 * taps):
        return reference_short_conv(x_BTD, weight_DW, seq, history_BWD)
    return convolve_line(x_BTD, weight_DW, seq, history_BWD)
