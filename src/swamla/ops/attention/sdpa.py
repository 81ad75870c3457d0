"""Attention by PyTorch's `scaled_dot_product_attention`, which never writes its scores down: the backend "sdpa"."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from swamla.ops.attention.cpu import additive_mask, each_document
from swamla.ops.graphs import outside_graphs
from swamla.ops.layout import Layout


@outside_graphs
def attend_by_sdpa(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, seq: Layout, *, window: int | None, sinks: int, scale: float
) -> Tensor:
    """Each token attends to its document's last `window` tokens, all where None, and first `sinks`: (B, T, H, V)."""

    def attend(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor) -> Tensor:
        if window is None:
            return _fused(q_BTHK, k_BTGK, v_BTGV, None, scale)
        return _in_bands(q_BTHK, k_BTGK, v_BTGV, window=window, sinks=sinks, scale=scale)

    return each_document(attend, q_BTHK, k_BTGK, v_BTGV, seq)


def _in_bands(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, *, window: int, sinks: int, scale: float) -> Tensor:
    """Blocks of `window` queries: each sees the document's sinks, the block before its own, and its own.

    The first ones, whose bands may touch the sinks, are one call with all keys up to them; a shorter last one another.
    """
    batch, time = q_BTHK.shape[:2]
    if time <= window + sinks:
        return _fused(q_BTHK, k_BTGK, v_BTGV, None, scale)
    first = -(-(window + sinks) // window) * window  # from here on bands and sinks lie apart
    if time <= first + window:
        mask = additive_mask(time, 0, 0, window, sinks, q_BTHK.dtype, q_BTHK.device)
        return _fused(q_BTHK, k_BTGK, v_BTGV, mask, scale)
    mask = additive_mask(first, 0, 0, window, sinks, q_BTHK.dtype, q_BTHK.device)
    outputs = [_fused(q_BTHK[:, :first], k_BTGK[:, :first], v_BTGV[:, :first], mask, scale)]
    whole = (time - first) // window * window
    for start, rows in ((first, window), (first + whole, time - first - whole)):
        stop = first + whole if rows == window else time
        if start == stop:
            continue
        q_NCHK = q_BTHK[:, start:stop].unflatten(1, (-1, rows)).flatten(0, 1)
        k_NSGK, v_NSGV = (_bands(x, start, stop, rows, window, sinks) for x in (k_BTGK, v_BTGV))
        mask = additive_mask(rows, window, sinks, window, 0, q_BTHK.dtype, q_BTHK.device)
        outputs.append(_fused(q_NCHK, k_NSGK, v_NSGV, mask, scale).unflatten(0, (batch, -1)).flatten(1, 2))
    return torch.cat(outputs, dim=1)


def _bands(x_BTGK: Tensor, start: int, stop: int, rows: int, window: int, sinks: int) -> Tensor:
    """(N, sinks + window + rows, G, K): the keys of each of the blocks of `rows` queries in [start, stop)."""
    own_BNCGK = x_BTGK[:, start:stop].unflatten(1, (-1, rows))
    before_BNWGK = x_BTGK[:, start - window : stop - rows].unflatten(1, (-1, window))
    sinks_BNSGK = x_BTGK[:, None, :sinks].expand(-1, own_BNCGK.shape[1], -1, -1, -1)
    return torch.cat([sinks_BNSGK, before_BNWGK, own_BNCGK], dim=2).flatten(0, 1)


def _fused(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, mask_TS: Tensor | None, scale: float) -> Tensor:
    """Under an additive mask, or a causal one. Zeros widen what is narrower, as the kernel wants one width."""
    width = v_BSGV.shape[-1]
    q, k, v = (_widened(x, max(k_BSGK.shape[-1], width)).transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGV))
    grouped = q.shape[1] != k.shape[1]
    o = scaled_dot_product_attention(
        q, k, v, attn_mask=mask_TS, is_causal=mask_TS is None, scale=scale, enable_gqa=grouped
    )
    return o.transpose(1, 2)[..., :width]


def _widened(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x
