"""Attention by PyTorch's `scaled_dot_product_attention`, which does not materialise scores: the backend "sdpa"."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from swamla.ops.attention.cpu import MaskShape, additive_mask, each_document
from swamla.ops.attention.reference import Window
from swamla.ops.graphs import outside_graphs
from swamla.ops.layout import Layout


@outside_graphs
def attend_by_sdpa(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    seq: Layout,
    window: Window,
    scale: float,
    sink_logit_H: Tensor | None = None,
) -> Tensor:
    """o (B, T, H, V): attention within each document, under its window."""
    if sink_logit_H is not None:
        return _with_sink_logit(q_BTHK, k_BTGK, v_BTGV, seq, window, scale, sink_logit_H)

    def attend(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor) -> Tensor:
        if window.size is None:
            return _fused(q_BTHK, k_BTGK, v_BTGV, None, scale)
        return _in_bands(q_BTHK, k_BTGK, v_BTGV, window.size, window.sinks, scale)

    return each_document(attend, q_BTHK, k_BTGK, v_BTGV, seq)


def _with_sink_logit(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    seq: Layout,
    window: Window,
    scale: float,
    sink_logit_H: Tensor,
) -> Tensor:
    """As with one more sink, a virtual token before each document, whose score is the logit and whose value is zero.

    PyTorch's kernels return no log-sum-exp that could be differentiated. One more element of a head holds the logit in
    queries, 1 in the virtual key, and 0 in all others.
    """
    one_more = window if window.size is None else Window(window.size, window.sinks + 1)

    def attend(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor) -> Tensor:
        batch, time = q_BTHK.shape[:2]
        logit_BTH1 = (sink_logit_H / scale).to(q_BTHK.dtype)[:, None].expand(batch, time, -1, 1)
        q_BTHK = F.pad(torch.cat((q_BTHK, logit_BTH1), dim=-1), (0, 0, 0, 0, 1, 0))
        virtual_B1GK = F.pad(k_BTGK.new_zeros(batch, 1, *k_BTGK.shape[2:]), (0, 1), value=1.0)
        k_BTGK = torch.cat((virtual_B1GK, F.pad(k_BTGK, (0, 1))), dim=1)
        v_BTGV = F.pad(v_BTGV, (0, 0, 0, 0, 1, 0))
        line = Layout.one_document_per_row(batch, time + 1, device=q_BTHK.device)
        return attend_by_sdpa(q_BTHK, k_BTGK, v_BTGV, line, one_more, scale)[:, 1:]

    return each_document(attend, q_BTHK, k_BTGK, v_BTGV, seq)


def _in_bands(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, window: int, sinks: int, scale: float) -> Tensor:
    """Blocks of `window` queries, each attending to the document's sinks, the previous block and its own block.

    The first blocks, whose bands may touch the sinks, are one call over all keys so far; the last, shorter block is
    another.
    """
    batch, time = q_BTHK.shape[:2]
    if time <= window + sinks:
        return _fused(q_BTHK, k_BTGK, v_BTGV, None, scale)
    first = -(-(window + sinks) // window) * window  # from this query on, bands and sinks do not touch
    if time <= first + window:
        mask = additive_mask(MaskShape(time, near_sinks=sinks, window=window), q_BTHK.dtype, q_BTHK.device)
        return _fused(q_BTHK, k_BTGK, v_BTGV, mask, scale)
    mask = additive_mask(MaskShape(first, near_sinks=sinks, window=window), q_BTHK.dtype, q_BTHK.device)
    outputs = [_fused(q_BTHK[:, :first], k_BTGK[:, :first], v_BTGV[:, :first], mask, scale)]
    whole = (time - first) // window * window
    for start, rows in ((first, window), (first + whole, time - first - whole)):
        stop = first + whole if rows == window else time
        if start == stop:
            continue
        q_NCHK = q_BTHK[:, start:stop].unflatten(1, (-1, rows)).flatten(0, 1)
        k_NSGK, v_NSGV = (_bands(x, start, stop, rows, window, sinks) for x in (k_BTGK, v_BTGV))
        shape = MaskShape(rows, before=window, sinks=sinks, window=window)
        mask = additive_mask(shape, q_BTHK.dtype, q_BTHK.device)
        outputs.append(_fused(q_NCHK, k_NSGK, v_NSGV, mask, scale).unflatten(0, (batch, -1)).flatten(1, 2))
    return torch.cat(outputs, dim=1)


def _bands(x_BTGK: Tensor, start: int, stop: int, rows: int, window: int, sinks: int) -> Tensor:
    """(N, sinks + window + rows, G, K): the keys of each of the N blocks of `rows` queries in [start, stop)."""
    own_BNCGK = x_BTGK[:, start:stop].unflatten(1, (-1, rows))
    before_BNWGK = x_BTGK[:, start - window : stop - rows].unflatten(1, (-1, window))
    sinks_BNSGK = x_BTGK[:, None, :sinks].expand(-1, own_BNCGK.shape[1], -1, -1, -1)
    return torch.cat([sinks_BNSGK, before_BNWGK, own_BNCGK], dim=2).flatten(0, 1)


def _fused(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, mask_TS: Tensor | None, scale: float) -> Tensor:
    """Attention under an additive mask, or causal (None). Zero-padded to one width, which the kernel needs."""
    width = v_BSGV.shape[-1]
    q, k, v = (pad_width(x, max(k_BSGK.shape[-1], width)).transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGV))
    grouped = q.shape[1] != k.shape[1]
    o = scaled_dot_product_attention(
        q, k, v, attn_mask=mask_TS, is_causal=mask_TS is None, scale=scale, enable_gqa=grouped
    )
    return o.transpose(1, 2)[..., :width]


def pad_width(x: Tensor, width: int) -> Tensor:
    """x, its last dimension zero-padded to `width`: scores stay equal, and outputs get columns to cut off."""
    return F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x
