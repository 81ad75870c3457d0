"""Softmax attention with its mask written out: what every fast path is tested against."""

from itertools import pairwise

import torch
from torch import Tensor

from swamla.ops.graphs import outside_graphs
from swamla.ops.layout import Layout


def allowed_mask(seq: Layout, *, window: int | None = None, sinks: int = 0) -> Tensor:
    """(B, T, S) bool: same document, not in the future, and within the window or among the document's first tokens.

        allowed(t, s) = same document ∧ s ≤ t ∧ (t − s < window ∨ pos(s) < sinks)       window None: no limit

    A document is known by where it begins, so an id that comes back later in the row is another document.
    """
    index_T = torch.arange(seq.shape[1], device=seq.position_BT.device)
    begin_BT = index_T - seq.position_BT
    distance_TS = index_T[:, None] - index_T
    allowed_BTS = (begin_BT[:, :, None] == begin_BT[:, None, :]) & (distance_TS >= 0)
    if window is None:
        return allowed_BTS
    return allowed_BTS & ((distance_TS < window) | (seq.position_BT < sinks)[:, None, :])


def reference_attention(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, allowed_BTS: Tensor, *, scale: float | None = None
) -> Tensor:
    """o = softmax(scale · q kᵀ) v over the allowed, computed in fp32 (double for double), in q's dtype: (B, T, H, V).

    Every query must be allowed at least one key. Key head g serves the H/G query heads from g·H/G on. scale: K^-½.
    """
    dtype = torch.promote_types(q_BTHK.dtype, torch.float32)
    shared = q_BTHK.shape[2] // k_BSGK.shape[2]
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q_BTHK.device.type, enabled=False):
        k_BSHK = k_BSGK.to(dtype).repeat_interleave(shared, dim=2)
        v_BSHV = v_BSGV.to(dtype).repeat_interleave(shared, dim=2)
        score_BHTS = scale * torch.einsum("bthk,bshk->bhts", q_BTHK.to(dtype), k_BSHK)
        weight_BHTS = score_BHTS.masked_fill(~allowed_BTS[:, None], float("-inf")).softmax(dim=-1)
        return torch.einsum("bhts,bshv->bthv", weight_BHTS, v_BSHV).to(q_BTHK.dtype)


@outside_graphs
def attend_by_mask(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, seq: Layout, *, window: int | None, sinks: int, scale: float
) -> Tensor:
    """`reference_attention` of every document alone: a weight of zero would let a NaN pass from one to another."""
    mask_BTT = seq.table(("mask", window, sinks), lambda: allowed_mask(seq, window=window, sinks=sinks))
    if seq.whole_rows:
        return reference_attention(q_BTHK, k_BTGK, v_BTGV, mask_BTT, scale=scale)
    rows = []
    for row, position_T in enumerate(seq.position_BT.tolist()):
        begins = [t for t, position in enumerate(position_T) if position == 0]
        documents = []
        for begin, end in pairwise([*begins, len(position_T)]):
            q, k, v = (x[row : row + 1, begin:end] for x in (q_BTHK, k_BTGK, v_BTGV))
            allowed = mask_BTT[row : row + 1, begin:end, begin:end]
            documents.append(reference_attention(q, k, v, allowed, scale=scale))
        rows.append(torch.cat(documents, dim=1))
    return torch.cat(rows)
