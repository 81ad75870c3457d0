"""Attention on CUDA: FlexAttention (arXiv 2412.05496), and cuDNN's kernel for causal rows of one document.

Graphs of torch.compile hold both. Not measured on GPU.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from swamla.errors import UsageError
from swamla.ops.attention.sdpa import attend_by_sdpa
from swamla.ops.graphs import compiled, outside_graphs
from swamla.ops.layout import Layout

BLOCK = 128  # tokens a block of the mask has on either side: FlexAttention's own, a multiple of every kernel's tile
NARROWEST = 16  # heads FlexAttention's kernels take
WIDEST_FP32 = 128  # keys in fp32 whose tiles fit into shared memory
KERNEL = {"FORCE_USE_FLEX_ATTENTION": True}  # never the one for decoding, which short rows would get
# By the width of 16-bit keys: with torch's own four warps these kernels spill two kilobytes by ptxas' count, with eight
# next to nothing. Compiled for sm_90a, not run: `python -m benchmarks.flex_kernels`, docs/performance.md.
KERNELS = {64: {"fwd_num_warps": 8}, 192: {"bwd_num_warps": 8}}
FUSED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]  # the second for fp32, one token, odd widths
MULTIPLE = 8  # of which both want the widths of heads to be one


def cudnn_attention(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, seq: Layout, *, window: int | None, sinks: int, scale: float
) -> Tensor:
    """Each token attends to its document up to itself: (B, T, H, V); widths of keys and values may differ.

    FlexAttention's where documents share a row: one kernel for all of them under a block mask costs less than a call
    for each length (which fp32 heads too wide for it get). cuDNN knows no windows: `window` is None.
    """
    if not seq.whole_rows and too_wide_for_flex(q_BTHK):
        return attend_by_sdpa(q_BTHK, k_BTGK, v_BTGV, seq, window=window, sinks=sinks, scale=scale)
    if not seq.whole_rows:
        return flex_attention(q_BTHK, k_BTGK, v_BTGV, seq, window=window, sinks=sinks, scale=scale)
    return fused_attention(q_BTHK, k_BTGK, v_BTGV, scale=scale)


def fused_attention(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, *, scale: float) -> Tensor:
    """Causal attention of whole rows. Key heads shared by query heads are repeated, as not every kernel can share."""
    refuse_doubles("cudnn", q_BTHK)
    k_BTHK, v_BTHV = (repeated_for(q_BTHK, x) for x in (k_BTGK, v_BTGV))
    q, k, v = (widened(x.transpose(1, 2)) for x in (q_BTHK, k_BTHK, v_BTHV))
    with sdpa_kernel(FUSED, set_priority=True):
        o = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return o[..., : v_BTGV.shape[-1]].transpose(1, 2)


def flex_attention(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, seq: Layout, *, window: int | None, sinks: int, scale: float
) -> Tensor:
    """(B, T, H, V) under the mask of `reference.allowed_mask`; blocks in which nothing is allowed cost nothing."""
    refuse_doubles("flex", q_BTHK)
    if too_wide_for_flex(q_BTHK):
        raise UsageError(
            f'backend = "flex": fp32 keys of width {q_BTHK.shape[-1]} need more shared memory than a GPU has '
            f'(at most {WIDEST_FP32}): use "sdpa", or 16 bits'
        )
    mask = made_block_mask(seq, window, sinks)
    q, k, v = (at_least(NARROWEST, x.transpose(1, 2)) for x in (q_BTHK, k_BTGK, v_BTGV))
    grouped = q.shape[1] != k.shape[1]
    options = kernel_options(q.shape[-1], q.dtype)
    o = _flex()(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped, kernel_options=options)
    return o[..., : v_BTGV.shape[-1]].transpose(1, 2)


def too_wide_for_flex(q_BTHK: Tensor) -> bool:
    """Whether flex's tiles of these keys exceed the shared memory of a GPU's block: wide ones in fp32."""
    return q_BTHK.dtype == torch.float32 and q_BTHK.shape[-1] > WIDEST_FP32


def kernel_options(key: int, dtype: torch.dtype) -> dict[str, Any]:
    """FlexAttention's options for keys of this width; what they leave open torch chooses."""
    return KERNEL | (KERNELS.get(key, {}) if dtype.itemsize == 2 else {})


def refuse_doubles(backend: str, x: Tensor) -> None:
    """Raise UsageError for doubles, which no fused kernel takes."""
    if x.dtype == torch.float64:
        raise UsageError(f'backend = "{backend}": takes no float64: use "torch" or "reference"')


def repeated_for(q_BTHK: Tensor, x_BSGK: Tensor) -> Tensor:
    """Key or value heads, each repeated for the query heads that share it: (B, S, H, K)."""
    shared = q_BTHK.shape[2] // x_BSGK.shape[2]
    return x_BSGK if shared == 1 else x_BSGK.repeat_interleave(shared, dim=2)


def widened(x: Tensor) -> Tensor:
    """x, widened by zeros to the next multiple that fused kernels take."""
    return at_least(-(-x.shape[-1] // MULTIPLE) * MULTIPLE, x)


def at_least(width: int, x: Tensor) -> Tensor:
    """x, widened by zeros: they add nothing to a score, and to an output nothing but columns that are cut off."""
    return x if x.shape[-1] >= width else F.pad(x, (0, width - x.shape[-1]))


def _flex() -> Any:
    """Compiled, as uncompiled it would write out all scores; inside a graph it is compiled with it."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)


def made_block_mask(seq: Layout, window: int | None, sinks: int) -> Any:
    """The layout's one BlockMask for this window, made at its first use: best before a graph that needs it."""
    made = seq.made(("flex", window, sinks))
    return _make_block_mask(seq, window, sinks) if made is None else made


@outside_graphs
def _make_block_mask(seq: Layout, window: int | None, sinks: int) -> Any:
    return seq.table(("flex", window, sinks), lambda: block_mask(seq, window, sinks))


def block_mask(seq: Layout, window: int | None, sinks: int) -> Any:
    """Which of the document's tokens each sees, as blocks: nothing of size T × T is ever made, the host never waits.

    Token t sees [begin, sinks' end) and [low, t], the second beginning at its document or at its window. The numbers
    lie in tensors, so that kernels compiled for one window serve another.
    """
    from torch.nn.attention.flex_attention import BlockMask

    time = seq.shape[1]
    index_T = torch.arange(time, device=seq.position_BT.device, dtype=torch.int32)
    begin_BT = (index_T - seq.position_BT).int()
    low_BT = begin_BT if window is None else torch.maximum(begin_BT, index_T - (window - 1))
    sinks_end_BT = None if window is None or not sinks else begin_BT + sinks
    partial_BNM, full_BNM = _blocks(index_T, begin_BT, low_BT, sinks_end_BT)
    # Keys by queries and queries by keys, which the backward pass reads: sorted as one, for few launches.
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
    """(B, N, N) bools: blocks of queries (rows) that see some, and all, of a block of keys.

    Neither end of what a token sees moves back from one token to the next, so the first and the last of a block of
    queries decide. Blocks full of sinks count as partly seen, which costs little.
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
    """Of each (B, N, M): how many blocks each row has, and their columns in front of the others', both int32."""
    blocks_XB1NM = torch.stack(ways).unsqueeze(2).view(torch.uint8)
    columns_XB1NM = blocks_XB1NM.argsort(dim=-1, descending=True, stable=True)
    # Each a tensor of its own: a graph has guards on where views begin, and would be compiled for other lengths anew.
    pairs = zip(blocks_XB1NM.unbind(), columns_XB1NM.unbind(), strict=True)
    return [(blocks.sum(dim=-1, dtype=torch.int32), columns.int()) for blocks, columns in pairs]
