"""Causal attention by documents, on the backend "torch"."""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from swamla.ops.attention.documents import each_document
from swamla.ops.attention.tiled import kept_keys, tiled_attention
from swamla.ops.layout import Layout


def torch_causal_attention(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, seq: Layout, *, scale: float) -> Tensor:
    """Each token attends to its document up to itself: (B, T, H, V), time quadratic in a document's length."""
    bf16, widths = q_BTHK.dtype == torch.bfloat16, (k_BTGK.shape[-1], v_BTGV.shape[-1])
    own = q_BTHK.device.type == "cpu" and in_tiles(bf16, *widths)
    return each_document(partial(_tiled if own else _fused, scale=scale), q_BTHK, k_BTGK, v_BTGV, seq)


def in_tiles(bf16: bool, key_width: int, value_width: int) -> bool:
    """Whether a CPU computes causal attention in tiles of our own.

    PyTorch's own kernel wants one width for keys and values, and gains nothing from bf16.
    """
    return bf16 or key_width != value_width


def kept_causal_keys(length: int, *, bf16: bool, key_width: int, value_width: int) -> float:
    """How many weights a query keeps for the backward on a CPU, on average."""
    return kept_keys(length, length, 0) if in_tiles(bf16, key_width, value_width) else 0.0


def _tiled(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, *, scale: float) -> Tensor:
    return tiled_attention(q_BTHK, k_BTGK, v_BTGV, window=q_BTHK.shape[1], sinks=0, scale=scale)


def _fused(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, *, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGV))
    grouped = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped).transpose(1, 2)
