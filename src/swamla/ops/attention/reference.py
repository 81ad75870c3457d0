"""Softmax attention with an explicit mask: the definition that every fast path is tested against."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from swamla.ops.autocast import without_autocast
from swamla.ops.graphs import outside_graphs
from swamla.ops.layout import Layout


class Window(NamedTuple):
    """What a query attends to: the last `size` tokens of its document, itself included, and the first `sinks`.

    size: None for causal attention, to all earlier tokens of the document.
    """

    size: int | None = None
    sinks: int = 0


CAUSAL = Window()


def allowed_mask(seq: Layout, window: Window = CAUSAL) -> Tensor:
    """(B, T, S) bool: which tokens of its row each token attends to.

        allowed(t, s) = same document ∧ s ≤ t ∧ (t − s < size ∨ pos(s) < sinks)       size None: no limit

    Documents are compared by their first index: an id that appears again later in the row is another document.
    """
    index_T = torch.arange(seq.shape[1], device=seq.position_BT.device)
    begin_BT = index_T - seq.position_BT
    distance_TS = index_T[:, None] - index_T
    allowed_BTS = (begin_BT[:, :, None] == begin_BT[:, None, :]) & (distance_TS >= 0)
    if window.size is None:
        return allowed_BTS
    return allowed_BTS & ((distance_TS < window.size) | (seq.position_BT < window.sinks)[:, None, :])


def reference_attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    allowed_BTS: Tensor,
    *,
    scale: float | None = None,
    sink_logit_H: Tensor | None = None,
) -> Tensor:
    """o (B, T, H, V) = softmax(scale · q kᵀ) v over the allowed keys, computed in fp32 (fp64 for fp64), in q's dtype.

    Each query must have at least one allowed key. Query heads g·H/G … (g + 1)·H/G − 1 share key head g. scale: K^-½
    unless given. A sink logit adds exp(sink_logit) to the softmax's denominator, and nothing to its numerator.
    Source: arXiv 1706.03762, eq. 1; shared heads: 2305.13245; sink logits: 2508.10925.
    """
    dtype, shared = torch.promote_types(q_BTHK.dtype, torch.float32), q_BTHK.shape[2] // v_BSGV.shape[2]
    weight_BHTS = attention_weights(q_BTHK, k_BSGK, allowed_BTS, scale=scale, sink_logit_H=sink_logit_H)
    with without_autocast(q_BTHK.device.type):
        v_BSHV = v_BSGV.to(dtype).repeat_interleave(shared, dim=2)
        return torch.einsum("bhts,bshv->bthv", weight_BHTS, v_BSHV).to(q_BTHK.dtype)


def attention_weights(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    allowed_BTS: Tensor,
    *,
    scale: float | None = None,
    sink_logit_H: Tensor | None = None,
) -> Tensor:
    """(B, H, T, S), in fp32 (fp64 for fp64): the softmax of `reference_attention`, 0 where a key is not allowed."""
    dtype = torch.promote_types(q_BTHK.dtype, torch.float32)
    shared = q_BTHK.shape[2] // k_BSGK.shape[2]
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    with without_autocast(q_BTHK.device.type):
        k_BSHK = k_BSGK.to(dtype).repeat_interleave(shared, dim=2)
        score_BHTS = scale * torch.einsum("bthk,bshk->bhts", q_BTHK.to(dtype), k_BSHK)
        score_BHTS = score_BHTS.masked_fill(~allowed_BTS[:, None], float("-inf"))
        if sink_logit_H is None:
            return score_BHTS.softmax(dim=-1)
        sink_BHT1 = sink_logit_H.to(dtype)[:, None, None].expand(*score_BHTS.shape[:3], 1)
        return torch.cat((sink_BHT1, score_BHTS), dim=-1).softmax(dim=-1)[..., 1:]


@outside_graphs
def attend_by_mask(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    seq: Layout,
    window: Window,
    scale: float,
    sink_logit_H: Tensor | None = None,
) -> Tensor:
    """`reference_attention` of each document separately: under a mask alone, 0 · NaN would reach other documents."""
    mask_BTT = seq.table(("mask", window), lambda: allowed_mask(seq, window))
    if seq.whole_rows:
        return reference_attention(q_BTHK, k_BTGK, v_BTGV, mask_BTT, scale=scale, sink_logit_H=sink_logit_H)
    rows = []
    for row, position_T in enumerate(seq.position_BT.tolist()):
        begins = [t for t, position in enumerate(position_T) if position == 0]
        documents = []
        for begin, end in pairwise([*begins, len(position_T)]):
            q, k, v = (x[row : row + 1, begin:end] for x in (q_BTHK, k_BTGK, v_BTGV))
            allowed = mask_BTT[row : row + 1, begin:end, begin:end]
            documents.append(reference_attention(q, k, v, allowed, scale=scale, sink_logit_H=sink_logit_H))
        rows.append(torch.cat(documents, dim=1))
    return torch.cat(rows)
