"""Attention of new tokens to a cache: of keys and values, or of latents that serve as both."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from swamla.ops.attention.cuda import pad_to_multiple, repeat_heads
from swamla.ops.linear import linear

ROWS = 128  # query rows of a block on a CPU: enough for the full rate of its matmul, few enough for the cache
FEW = 1 << 14  # with fewer scores than this per block, all rows and heads are one matmul
SCORES = 16_000_000  # elements of a block's scores or mask, which bounds memory
ON_ACCELERATORS = 16  # accelerators take that many times SCORES
LENGTHS = 256  # decoding reads the latent cache in multiples of it, because oneDNN caches kernels by shape


def attend_to_cache(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    allowed_BTS: Tensor | None,
    *,
    scale: float,
    sink_logit_H: Tensor | None = None,
) -> Tensor:
    """o (B, T, H, V): attention under a mask, where a query without an allowed key gives zeros; or causal (None).

    Causal: the T queries are those of the last T of the S cached tokens. Query heads that share a key head are stacked
    as rows of one matrix, so that the cache is not copied per head. Queries are processed in blocks, which bounds the
    memory of masks and scores. Sink logits, which no fused kernel takes, are one more column of plain scores.
    """
    batch, time, heads, _ = q_BTHK.shape
    size, groups = k_BSGK.shape[1:3]
    plain = sink_logit_H is None
    fused = plain and k_BSGK.shape[-1] == v_BSGV.shape[-1]  # for other widths PyTorch would cast the cache to fp32
    if allowed_BTS is None and time == 1 and fused:
        q_BGRK = q_BTHK.squeeze(1).unflatten(1, (groups, -1))
        k_BGSK, v_BGSV = k_BSGK.transpose(1, 2), v_BSGV.transpose(1, 2)
        return scaled_dot_product_attention(q_BGRK, k_BGSK, v_BGSV, scale=scale).flatten(1, 2).unsqueeze(1)
    # Not fp64, which no fused kernel supports: PyTorch would materialise the whole mask and all scores.
    if plain and allowed_BTS is None and time > 1 and q_BTHK.device.type != "cpu" and q_BTHK.dtype != torch.float64:
        return attend_lower_right(q_BTHK, k_BSGK, v_BSGV, scale)
    q_BGRTK = q_BTHK.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
    shared = q_BGRTK.shape[2]
    if plain and allowed_BTS is None and q_BTHK.device.type == "cpu" and min(ROWS, shared * time) * size >= FEW:
        return _in_blocks(q_BGRTK, k_BSGK, v_BSGV, scale)
    masks = shared if allowed_BTS is None else batch * shared
    blocks = [
        _block(
            q_BGRTK[:, :, :, part], k_BSGK, v_BSGV, _mask(allowed_BTS, part, time, k_BSGK), scale, fused, sink_logit_H
        )
        for part in _query_blocks(time, size * (masks if fused else batch * heads), q_BTHK.device)
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


def attend_lower_right(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, scale: float) -> Tensor:
    """Causal attention of the last T of S tokens, without a mask, by a fused kernel if one supports the inputs."""
    from torch.nn.attention.bias import causal_lower_right  # this import loads torch's compiler

    k_BSHK, v_BSHV = (repeat_heads(x, q_BTHK) for x in (k_BSGK, v_BSGV))
    q, k, v = (pad_to_multiple(x.transpose(1, 2)) for x in (q_BTHK, k_BSHK, v_BSHV))
    mask = causal_lower_right(q.shape[2], k.shape[2])
    o_BHTV = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return o_BHTV[..., : v_BSGV.shape[-1]].transpose(1, 2)


def _query_blocks(time: int, elements: int, device: torch.device) -> list[slice]:
    """Blocks of queries that bound memory: each query needs `elements` elements of scores or masks."""
    if torch.compiler.is_exporting() or time == 1:  # whatever the cache's size, on which a graph must not depend
        return [slice(0, time)]
    rows = max(1, (SCORES if device.type == "cpu" else ON_ACCELERATORS * SCORES) // elements)
    return [slice(begin, min(begin + rows, time)) for begin in range(0, time, rows)]


def _mask(allowed_BTS: Tensor | None, part: slice, time: int, keys_BSX: Tensor) -> Tensor:
    """The mask of a block of queries, (B or 1, rows, S); without a given mask, the causal one of the last T tokens."""
    if allowed_BTS is not None:
        return allowed_BTS[:, part]
    size = keys_BSX.shape[1]
    ones_1TS = torch.ones(1, part.stop - part.start, size, dtype=torch.bool, device=keys_BSX.device)
    return ones_1TS.tril(size - time + part.start)


def _block(
    q_BGRTK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    allowed_BTS: Tensor,
    scale: float,
    fused: bool,
    sink_logit_H: Tensor | None = None,
) -> Tensor:
    """Attention of a block of queries, all heads at once: (B, T, H, V)."""
    shared, time = q_BGRTK.shape[2:4]
    q_BGMK = q_BGRTK.flatten(2, 3)
    allowed_B1MS = allowed_BTS[:, None].expand(-1, shared, -1, -1).flatten(1, 2)[:, None]
    if fused:
        k_BGSK, v_BGSV = k_BSGK.transpose(1, 2), v_BSGV.transpose(1, 2)
        o_BGMV = scaled_dot_product_attention(q_BGMK, k_BGSK, v_BGSV, attn_mask=allowed_B1MS, scale=scale)
    else:
        sink_GM = None if sink_logit_H is None else sink_logit_H.view(-1, shared, 1).expand(-1, -1, time).flatten(1)
        o_BGMV = _matmuls(q_BGMK, k_BSGK, v_BSGV, allowed_B1MS, scale, sink_GM)
    return o_BGMV.unflatten(2, (shared, time)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _matmuls(
    q_BGMK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, allowed_B1MS: Tensor, scale: float, sink_GM: Tensor | None
) -> Tensor:
    score_BGMS = torch.matmul(q_BGMK * scale, k_BSGK.permute(0, 2, 3, 1))
    score_BGMS = score_BGMS.to(torch.promote_types(q_BGMK.dtype, torch.float32))
    if sink_GM is None:
        weight_BGMS = _masked(score_BGMS, allowed_B1MS)
    else:
        sink_BGM1 = sink_GM.to(score_BGMS.dtype)[..., None].expand(*score_BGMS.shape[:3], 1)
        score_BGMS = score_BGMS.masked_fill(~allowed_B1MS, -torch.inf)
        weight_BGMS = torch.cat((score_BGMS, sink_BGM1), dim=-1).softmax(dim=-1)[..., :-1]
    return torch.matmul(weight_BGMS.to(v_BSGV.dtype), v_BSGV.transpose(1, 2))


def _masked(score: Tensor, allowed: Tensor | None) -> Tensor:
    """Softmax over the allowed scores (None: all) of the last dimension."""
    if allowed is None:
        return score.softmax(dim=-1)
    weight = score.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
    return weight.masked_fill(~allowed, 0.0)  # zeros, not NaN, for rows that allow nothing


def _in_blocks(q_BGRTK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, scale: float) -> Tensor:
    """Causal attention of the last T of S tokens in blocks of queries, each by plain matmuls over the block's keys.

    As in `cpu.py`, except that most keys have no query here, and that each matmul is one head's, so that fp32 can use
    oneDNN. The causal mask is added only to the keys after a block's first query. Shapes: N (rows × key heads), R query
    heads that share a key head, M (queries of a block × R).
    """
    batch, groups, shared, time, _ = q_BGRTK.shape
    k_NSK, v_NSV = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (k_BSGK, v_BSGV))
    q_NRTK = q_BGRTK.flatten(0, 1) * scale
    past = k_NSK.shape[1] - time
    o_NRTV = q_NRTK.new_empty(*q_NRTK.shape[:3], v_NSV.shape[-1])
    block = max(1, ROWS // shared)
    for begin in range(0, time, block):
        rows = min(block, time - begin)
        first = past + begin
        seen = min(rounded_up(first + rows, ROWS), k_NSK.shape[1])
        later_TS = torch.full((rows, seen - first), -torch.inf, dtype=q_NRTK.dtype).triu_(1)
        for n in range(batch * groups):
            q_MK = q_NRTK[n, :, begin : begin + rows].flatten(0, 1)
            score_RTS = linear(q_MK, k_NSK[n, :seen]).unflatten(0, (shared, rows))
            score_RTS[..., first:] += later_TS
            o_MV = linear(score_RTS.softmax(dim=-1).flatten(0, 1), v_NSV[n, :seen].mT)
            o_NRTV[n, :, begin : begin + rows] = o_MV.unflatten(0, (shared, rows))
    return o_NRTV.unflatten(0, (batch, groups)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def attend_to_latents(
    q_BTHR: Tensor, latent_BSR: Tensor, filled: int, allowed_BTS: Tensor | None, *, scale: float
) -> Tensor:
    """o (B, T, H, R): attention to the first `filled` latents of a state, which are the keys and values of all heads.

    The mask is as in `attend_to_cache`. Plain matmuls read the latents without a copy; for a batch of one row on a CPU
    they are oneDNN's. One new token reads a rounded number of latents, with those after `filled` masked. Queries are
    processed in blocks.
    """
    batch, time, heads, _ = q_BTHR.shape
    if allowed_BTS is None and time == 1:
        size = min(rounded_up(filled, LENGTHS), latent_BSR.shape[1])
        return _latent_block(q_BTHR * scale, latent_BSR[:, :size].to(q_BTHR.dtype), filled, None)
    latent_BSR = latent_BSR[:, :filled].to(q_BTHR.dtype)
    blocks = [
        _latent_block(q_BTHR[:, part] * scale, latent_BSR, filled, _mask(allowed_BTS, part, time, latent_BSR))
        for part in _query_blocks(time, batch * heads * filled, q_BTHR.device)
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


def _latent_block(q_BTHR: Tensor, latent_BSR: Tensor, filled: int, allowed_BTS: Tensor | None) -> Tensor:
    score_BTHS = _times(q_BTHR, latent_BSR).to(torch.promote_types(q_BTHR.dtype, torch.float32))
    if latent_BSR.shape[1] > filled:
        score_BTHS[..., filled:] = -torch.inf
    weight_BTHS = _masked(score_BTHS, None if allowed_BTS is None else allowed_BTS[:, :, None])
    return _times(weight_BTHS.to(latent_BSR.dtype), latent_BSR.mT)


def _times(x_BTHK: Tensor, y_BSK: Tensor) -> Tensor:
    """(B, T, H, S): inner products of all vectors of x and y in the same row of the batch."""
    x_BMK = x_BTHK.flatten(1, 2)
    product_BMS = linear(x_BMK, y_BSK[0]) if y_BSK.shape[0] == 1 else torch.bmm(x_BMK, y_BSK.mT)
    return product_BMS.unflatten(1, x_BTHK.shape[1:3])


def rounded_up(length: int, least: int) -> int:
    """`length` rounded up to a multiple of `least`, or of 1/16 of the power of two below it if that is larger.

    oneDNN builds and caches a kernel for every new shape, which takes longer than a product: this leaves few shapes.
    """
    step = max(least, 1 << max(0, length.bit_length() - 5))
    return -(-length // step) * step
