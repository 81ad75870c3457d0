"""Causal depthwise convolution of a few taps, then SiLU: the local mixing in front of a linear recurrence."""

from torch import Tensor

from swamla.errors import UsageError
from swamla.ops.graphs import is_fused
from swamla.ops.layout import Layout
from swamla.ops.short_conv.cpu import convolve_line
from swamla.ops.short_conv.cuda import fused_short_conv
from swamla.ops.short_conv.reference import reference_short_conv

__all__ = ["BACKENDS", "short_conv"]

BACKENDS = ("auto", "reference", "torch")


def short_conv(
    x_BTD: Tensor,
    weight_DW: Tensor,
    *,
    seq: Layout | None = None,
    history_BWD: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """silu(sum_i weight[:, i] x[t - (W - 1) + i]): y (B, T, D) in x's dtype; weight[:, -1] meets the current token.

    A token sees its own document only. `history_BWD` holds the W - 1 inputs before the row (zeros unless given); they
    belong to the document of the row's first token. Backends: "reference" (a masked sum of shifted inputs), "torch"
    (hand-written backward), "auto" ("reference" for rows shorter than two windows, else "torch"; in a graph on a GPU
    tensor code of which the compiler makes one kernel a pass). Raises UsageError for any other.
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
