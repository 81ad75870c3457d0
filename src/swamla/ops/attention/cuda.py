"""Attention on CUDA: FlexAttention (arXiv 2412.05496), and cuDNN's kernel for causal rows of one document.

torch.compile traces both.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from swamla.errors import UsageError
from swamla.ops.attention.reference import Window
from swamla.ops.attention.sdpa import attend_by_sdpa, pad_width
from swamla.ops.graphs import compiled, in_dtype_of, outside_graphs
from swamla.ops.layout import Layout

BLOCK = 128  # queries and keys per block of the mask: FlexAttention's default, a multiple of every kernel's tile
NARROWEST = 16  # the smallest head width that FlexAttention's kernels support
WIDEST_FP32 = 128  # the largest fp32 key width whose tiles fit into shared memory
KERNEL = {"FORCE_USE_FLEX_ATTENTION": True}  # never the decoding kernel, which short rows would otherwise select
# By the width of 16-bit keys: with torch's own four warps these kernels spill two kilobytes by ptxas' count, with eight
# next to nothing. Compiled for sm_90a, not run: `python -m benchmarks.flex_kernels`, docs/performance.md.
KERNELS = {64: {"fwd_num_warps": 8}, 192: {"bwd_num_warps": 8}}
FUSED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]  # the second for fp32, one token, odd widths
MULTIPLE = 8  # both kernels need head widths that are multiples of it


def cudnn_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    seq: Layout,
    window: Window,
    scale: float,
    sink_logit_H: Tensor | None = None,
) -> Tensor:
    """o (B, T, H, V): causal attention within each document; key and value widths may differ.

    Packed rows use FlexAttention: one kernel under a block mask costs less than one call per document length. fp32
    heads that are too wide for it use `attend_by_sdpa`. So do rows with a sink logit, for which the log-sum-exp has to
    be differentiated. cuDNN supports no sliding window: `window` is CAUSAL.
    """
    if not seq.whole_rows or sink_logit_H is not None:
        attend = attend_by_sdpa if too_wide_for_flex(q_BTHK) else flex_attention
        return attend(q_BTHK, k_BTGK, v_BTGV, seq, window, scale, sink_logit_H)
    return fused_attention(q_BTHK, k_BTGK, v_BTGV, scale=scale)


def fused_attention(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, *, scale: float) -> Tensor:
    """Causal attention of whole rows. Shared key heads are repeated, because not every kernel supports sharing."""
    refuse_fp64("cudnn", q_BTHK)
    k_BTHK, v_BTHV = (repeat_heads(x, q_BTHK) for x in (k_BTGK, v_BTGV))
    q, k, v = (pad_to_multiple(x.transpose(1, 2)) for x in (q_BTHK, k_BTHK, v_BTHV))
    with sdpa_kernel(FUSED, set_priority=True):
        o = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return o[..., : v_BTGV.shape[-1]].transpose(1, 2)


def flex_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    seq: Layout,
    window: Window,
    scale: float,
    sink_logit_H: Tensor | None = None,
) -> Tensor:
    """o (B, T, H, V) under the mask of `reference.allowed_mask`; fully masked blocks are skipped.

    A sink logit multiplies the outputs by σ(ℓ − logit), where ℓ is the log-sum-exp of a query's scores.
    """
    refuse_fp64("flex", q_BTHK)
    if too_wide_for_flex(q_BTHK):
        raise UsageError(
            f'backend = "flex": fp32 keys of width {q_BTHK.shape[-1]} need more shared memory than a GPU has '
            f'(at most {WIDEST_FP32}): use "sdpa", or 16 bits'
        )
    mask = block_mask_of(seq, window)
    q, k, v = (pad_width(x.transpose(1, 2), NARROWEST) for x in (q_BTHK, k_BTGK, v_BTGV))
    grouped = q.shape[1] != k.shape[1]
    options = kernel_options(q.shape[-1], q.dtype)
    settings = {"block_mask": mask, "scale": scale, "enable_gqa": grouped, "kernel_options": options}
    if sink_logit_H is None:
        o = _flex()(q, k, v, **settings)
    else:
        o, lse_BHT = _with_lse(q, k, v, settings)
        share_BHT1 = (lse_BHT - sink_logit_H[:, None]).sigmoid()[..., None]
        o = in_dtype_of(o, o * share_BHT1)
    return o[..., : v_BTGV.shape[-1]].transpose(1, 2)


def _with_lse(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Outputs, and log-sum-exps (B, H, T) in fp32, through which gradients flow."""
    from torch.nn.attention.flex_attention import AuxRequest

    o_BHTV, aux = _flex()(q_BHTK, k_BGTK, v_BGTV, **settings, return_aux=AuxRequest(lse=True))
    return o_BHTV, aux.lse


def too_wide_for_flex(q_BTHK: Tensor) -> bool:
    """Whether FlexAttention's tiles of these keys exceed a thread block's shared memory: wide keys in fp32."""
    return q_BTHK.dtype == torch.float32 and q_BTHK.shape[-1] > WIDEST_FP32


def kernel_options(key: int, dtype: torch.dtype) -> dict[str, Any]:
    """FlexAttention's options for keys of this width; torch chooses the others."""
    return KERNEL | (KERNELS.get(key, {}) if dtype.itemsize == 2 else {})


def refuse_fp64(backend: str, x: Tensor) -> None:
    """Raise UsageError for fp64, which no fused kernel supports."""
    if x.dtype == torch.float64:
        raise UsageError(f'backend = "{backend}": takes no float64: use "torch" or "reference"')


def repeat_heads(x_BSGK: Tensor, q_BTHK: Tensor) -> Tensor:
    """Key or value heads, each repeated for the query heads that share it: (B, S, H, K)."""
    shared = q_BTHK.shape[2] // x_BSGK.shape[2]
    return x_BSGK if shared == 1 else x_BSGK.repeat_interleave(shared, dim=2)


def pad_to_multiple(x: Tensor) -> Tensor:
    """x, zero-padded to the next head width that fused kernels support."""
    return pad_width(x, -(-x.shape[-1] // MULTIPLE) * MULTIPLE)


def _flex() -> Any:
    """The compiled function, because the uncompiled one materialises all scores; inside a graph, the plain one."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)


def block_mask_of(seq: Layout, window: Window) -> Any:
    """The layout's BlockMask for this window, built at its first use. If it was built eagerly, no graph breaks here."""
    # A flat key: torch.compile would guard on all keys of the table for a key that holds a NamedTuple.
    made = seq.made(("flex", window.size, window.sinks))
    return _build_block_mask(seq, window) if made is None else made


@outside_graphs
def _build_block_mask(seq: Layout, window: Window) -> Any:
    return seq.table(("flex", window.size, window.sinks), lambda: block_mask(seq, window))


def block_mask(seq: Layout, window: Window) -> Any:
    """The BlockMask of `allowed_mask`, built without a T × T tensor and without a device synchronisation.

    Token t attends to [begin, sinks_end) and [low, t], where `low` is the start of its document or of its window. These
    bounds are tensors, so that kernels compiled for one window serve another.
    """
    from torch.nn.attention.flex_attention import BlockMask

    time = seq.shape[1]
    index_T = torch.arange(time, device=seq.position_BT.device, dtype=torch.int32)
    begin_BT = (index_T - seq.position_BT).int()
    low_BT = begin_BT if window.size is None else torch.maximum(begin_BT, index_T - (window.size - 1))
    sinks_end_BT = None if window.size is None or not window.sinks else begin_BT + window.sinks
    partial_BNM, full_BNM = _blocks(index_T, begin_BT, low_BT, sinks_end_BT)
    # Keys by queries, and queries by keys, which the backward pass reads: sorted as one, in few launches.
    ways = [x for blocks in (partial_BNM, full_BNM) for x in (blocks, blocks.mT)]
    (kv_count, kv), (q_count, q), (full_kv_count, full_kv), (full_q_count, full_q) = _ordered(ways)
    return BlockMask(
        (time, time), kv_count, kv, full_kv_count, full_kv, q_count, q, full_q_count, full_q,
        BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=_allowed(begin_BT, low_BT, sinks_end_BT),
    )  # fmt: skip


def _allowed(begin_BT: Tensor, low_BT: Tensor, sinks_end_BT: Tensor | None) -> Any:
    def band(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (s >= low_BT[b, t]) & (s <= t)

    if sinks_end_BT is None:
        return band

    def band_and_sinks(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return ((s >= low_BT[b, t]) | ((s >= begin_BT[b, t]) & (s < sinks_end_BT[b, t]))) & (s <= t)

    return band_and_sinks


def _blocks(index_T: Tensor, begin_BT: Tensor, low_BT: Tensor, sinks_end_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, N, N) bools: query blocks (rows) that attend to some, and to all, of a key block (columns).

    Both bounds of a token's band grow with the token's index, so a query block's first and last token decide. Blocks
    full of sinks count as partial, which costs little.
    """
    first_N, low_BN1 = index_T[::BLOCK], low_BT[:, ::BLOCK, None]
    last_low_BN1 = low_BT[:, BLOCK - 1 :: BLOCK, None]
    if low_BT.shape[1] % BLOCK:
        last_low_BN1 = torch.cat((last_low_BN1, low_BT[:, -1:, None]), dim=1)
    earlier_NM = first_N[:, None] > first_N
    key_end_M = first_N + BLOCK  # one past the last key
    reached_BNM = low_BN1 < key_end_M
    if sinks_end_BT is not None:
        begin_BN1, end_BN1 = begin_BT[:, ::BLOCK, None], sinks_end_BT[:, ::BLOCK, None]
        reached_BNM = reached_BNM | ((begin_BN1 < key_end_M) & (end_BN1 > first_N))
    full_BNM = earlier_NM & (last_low_BN1 <= first_N)
    own_NM = first_N[:, None] == first_N
    return ((earlier_NM & reached_BNM) > full_BNM) | own_NM, full_BNM  # a > b: a and not b


def _ordered(ways: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Of each (B, N, M): the number of blocks in each row, and their column indices first, as BlockMask stores them."""
    blocks_XB1NM = torch.stack(ways).unsqueeze(2).view(torch.uint8)
    columns_XB1NM = blocks_XB1NM.argsort(dim=-1, descending=True, stable=True)
    # Tensors of their own: a graph guards on where views begin, and would be compiled anew for other lengths.
    pairs = zip(blocks_XB1NM.unbind(), columns_XB1NM.unbind(), strict=True)
    return [(blocks.sum(dim=-1, dtype=torch.int32), columns.int()) for blocks, columns in pairs]
