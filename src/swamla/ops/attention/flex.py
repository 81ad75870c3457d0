"""Causal and windowed attention on CUDA by FlexAttention, with one block mask a layout. Not measured on a GPU yet."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from swamla.ops.layout import Layout


def flex_attention(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, seq: Layout, *, window: int | None, sinks: int, scale: float
) -> Tensor:
    """Attention under the mask of `reference.allowed_mask`; blocks in which nothing is allowed cost nothing."""
    mask = seq.table(("flex", window, sinks), lambda: _block_mask(seq, window, sinks))
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGV))
    o = _compiled()(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return o.transpose(1, 2)


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)  # uncompiled, it would write out all scores


def _block_mask(seq: Layout, window: int | None, sinks: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    position_BT = seq.position_BT
    begin_BT = torch.arange(seq.shape[1], device=position_BT.device) - position_BT

    def allowed(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        causal = (begin_BT[b, t] == begin_BT[b, s]) & (s <= t)
        return causal if window is None else causal & ((t - s < window) | (position_BT[b, s] < sinks))

    batch, time = seq.shape
    return create_block_mask(allowed, batch, None, time, time, device=str(position_BT.device))
