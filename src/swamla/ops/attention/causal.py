"""Causal attention by documents, on the backend "torch"."""

from functools import partial

import torch
from torch import Tensor

from swamla.ops.attention.documents import each_document
from swamla.ops.attention.sdpa import sdpa_causal_attention
from swamla.ops.attention.tiled import kept_keys, tiled_attention
from swamla.ops.layout import Layout


def torch_causal_attention(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, seq: Layout, *, scale: float) -> Tensor:
    """Each token attends to its document up to itself: (B, T, H, V), time quadratic in a document's length."""
    bf16, widths = q_BTHK.dtype == torch.bfloat16, (k_BTGK.shape[-1], v_BTGV.shape[-1])
    own = q_BTHK.device.type == "cpu" and in_tiles(bf16, *widths)
    attend = tiled_causal_attention if own else sdpa_causal_attention
    return attend(q_BTHK, k_BTGK, v_BTGV, seq, scale=scale)


def tiled_causal_attention(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, seq: Layout, *, scale: float) -> Tensor:
    """The same on the backend "tiles"."""
    return each_document(partial(_tiled, scale=scale), q_BTHK, k_BTGK, v_BTGV, seq)


def in_tiles(bf16: bool, key_width: int, value_width: int) -> bool:
    """Whether "torch" computes causal attention in tiles of our own on a CPU; else it is what "sdpa" is.

    PyTorch's own kernel wants one width for keys and values, and without AMX gains nothing from bf16.
    """
    return bf16 or key_width != value_width


def kept_causal_keys(length: int, *, bf16: bool, key_width: int, value_width: int, backend: str) -> float:
    """How many weights a query keeps for the backward on a CPU, on average."""
    tiled = backend == "tiles" or (backend in ("auto", "torch") and in_tiles(bf16, key_width, value_width))
    return kept_keys(length, length, 0) if tiled else 0.0


def _tiled(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, *, scale: float) -> Tensor:
    return tiled_attention(q_BTHK, k_BTGK, v_BTGV, window=q_BTHK.shape[1], sinks=0, scale=scale)
