"""Causal depthwise convolution of a few taps, then SiLU, as used before a linear recurrence."""

from torch import Tensor

from swamla.errors import UsageError
from swamla.ops.graphs import is_fused
from swamla.ops.layout import Layout
from swamla.ops.short_conv.cpu import convolve_line
from swamla.ops.short_conv.cuda import fused_short_conv
from swamla.ops.short_conv.reference import reference_short_conv

BACKENDS = ("auto", "reference", "torch")


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
    backward), "auto" ("reference" for rows of T < 2 W, else "torch"; in compiled graphs on a GPU plain tensor code,
    fused into one kernel a pass). Raises UsageError for any other.
    """
    if backend not in BACKENDS:
        raise UsageError(f'backend = {backend!r}: short_conv has "auto", "reference" and "torch"')
    if backend == "auto" and history_BWD is None and is_fused(x_BTD):
        return fused_short_conv(x_BTD, weight_DW, seq)
    if backend == "auto":
        backend = "reference" if x_BTD.shape[1] < 2 * weight_DW.shape[-1] else "torch"
    if backend == "reference":
        return reference_short_conv(x_BTD, weight_DW, seq, history_BWD)
    return convolve_line(x_BTD, weight_DW, seq, history_BWD)
