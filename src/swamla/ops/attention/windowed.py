"""Sliding-window attention with sinks by documents, on the backend "torch"."""

from functools import partial

from torch import Tensor

from swamla.ops.attention.documents import each_document
from swamla.ops.attention.tiled import tiled_attention
from swamla.ops.layout import Layout


def torch_windowed_attention(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, seq: Layout, *, window: int, sinks: int, scale: float
) -> Tensor:
    """Each token attends to its document's last `window` tokens and first `sinks`: (B, T, H, V), time linear in T."""
    attend = partial(tiled_attention, window=window, sinks=sinks, scale=scale)
    return each_document(attend, q_BTHK, k_BTGK, v_BTGV, seq)
