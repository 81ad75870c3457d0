"""Causal depthwise convolution of a few taps, then SiLU: the local mixing in front of a linear recurrence."""

import torch
from torch import Tensor

from swamla.errors import UsageError
from swamla.ops.layout import Layout
from swamla.ops.short_conv.cpu import convolve_line
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
    """silu(sum_i weight[:, i] x[t - (W - 1) + i]): y (B, T, D) in x's dtype; weight[:, -1] meets the current token.

    A token sees its own document only. `history_BWD` holds the W - 1 inputs before the row (zeros unless given); they
    belong to the document of the row's first token. Backends: "reference" (a masked sum of shifted inputs), "torch"
    (hand-written backward), "auto" ("reference" for rows shorter than two windows, and in a graph on a GPU, whose
    compiler makes one kernel of it; else "torch"). Raises UsageError for any other.
    """
    if backend not in BACKENDS:
        raise UsageError(f'backend = {backend!r}: short_conv has "auto", "reference" and "torch"')
    if backend == "auto":
        fused = torch.compiler.is_compiling() and x_BTD.device.type != "cpu"
        backend = "reference" if fused or x_BTD.shape[1] < 2 * weight_DW.shape[-1] else "torch"
    if backend == "reference":
        return reference_short_conv(x_BTD, weight_DW, seq, history_BWD)
    return convolve_line(x_BTD, weight_DW, seq, history_BWD)
