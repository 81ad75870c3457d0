"""Attention as plain matrix products over tiles of queries: the backend "tiles", a CPU's fast path.

A tile is a stretch of queries and the keys that any of them sees: the document's sinks, if they lie behind the window,
and one band. Its scores are a matmul, one softmax and another matmul; tiles of one shape go as one batch. Where queries
see few keys their weights are kept for the backward, a quarter of its time; others are computed again, so that nothing
quadratic is kept. In bf16 this runs at the rate of the CPU's matmul; its price is that scores are rounded to bf16 (as
in every eager attention under autocast) and cross memory, which those of `sdpa.py` do not: which of the two is faster
depends on the machine and on how long documents are. Causal attention is the case of a window as long as the document.

Shapes in this file: N (documents × key heads), R query heads that share a key head, C queries and S keys of a tile,
M (documents × key heads × tiles).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swamla.ops.graphs import outside_graphs
from swamla.ops.layout import Layout

SCORES = 4_000_000  # of one batch of tiles, in elements: two or three such buffers in use, near the size of the caches
KEPT = 768  # keys a query sees in its tile, on average, for whose weights to be kept: 1.5 KB a query and head in bf16


@outside_graphs
def attend_in_tiles(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, seq: Layout, *, window: int | None, sinks: int, scale: float
) -> Tensor:
    """Each token attends to its document's last `window` tokens, all where None, and first `sinks`: (B, T, H, V)."""

    def attend(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor) -> Tensor:
        reach = q_BTHK.shape[1] if window is None else window
        return tiled_attention(q_BTHK, k_BTGK, v_BTGV, window=reach, sinks=sinks, scale=scale)

    return each_document(attend, q_BTHK, k_BTGK, v_BTGV, seq)


def each_document(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, seq: Layout
) -> Tensor:
    """Call `attend` with every run of `seq.runs` as (count, length, heads, width) and join what it returns.

    Documents never meet in one softmax, and the cost is the sum over documents, not that of the row.
    """
    if seq.whole_rows:
        return attend(q_BTHK, k_BTGK, v_BTGV)
    sizes = [count * length for count, length in seq.runs]
    parts = zip(*(torch.split(x.flatten(0, 1), sizes) for x in (q_BTHK, k_BTGK, v_BTGV)), strict=True)
    outputs = [
        attend(*(x.unflatten(0, run) for x in part)).flatten(0, 1) for run, part in zip(seq.runs, parts, strict=True)
    ]
    return torch.cat(outputs).unflatten(0, seq.shape) if outputs else torch.empty_like(q_BTHK[..., : v_BTGV.shape[-1]])


@dataclass(frozen=True)
class Tile:
    """`count` neighbours of C = `rows` queries each, the first at [first, first + rows).

    It sees its document's first `sinks` tokens and the band [low, first + rows); each neighbour's band lies `rows`
    further on.
    """

    first: int
    rows: int
    low: int
    sinks: int
    count: int = 1

    @property
    def band(self) -> int:
        return self.first + self.rows - self.low

    @property
    def size(self) -> int:
        """Scores of all neighbours, for one query head."""
        return self.count * self.rows * (self.sinks + self.band)

    def queries(self, x_NRTK: Tensor) -> Tensor:
        """(N, count, R, C, K), a view."""
        stop = self.first + self.count * self.rows
        return x_NRTK[:, :, self.first : stop].unflatten(2, (self.count, self.rows)).transpose(1, 2)

    def keys(self, x_NTK: Tensor) -> Tensor:
        """(M, S, K): sinks, then band."""
        if self.count == 1 and not self.sinks:
            return x_NTK[:, self.low : self.low + self.band]
        stop = self.low + self.band + (self.count - 1) * self.rows
        band_NMSK = x_NTK[:, self.low : stop].unfold(1, self.band, self.rows).transpose(2, 3)
        sinks_NMSK = x_NTK[:, None, : self.sinks].expand(-1, self.count, -1, -1)
        return torch.cat([sinks_NMSK, band_NMSK], dim=2).flatten(0, 1)

    def add_to_keys(self, total_NTK: Tensor, x_MSK: Tensor) -> None:
        """The transpose of `keys`: add each key's share to the token it came from."""
        x_NMSK = x_MSK.unflatten(0, (-1, self.count))
        if self.sinks:
            total_NTK[:, : self.sinks] += x_NMSK[:, :, : self.sinks].sum(dim=1, dtype=total_NTK.dtype)
        # Overlapping bands, as few sums of whole stretches; a lone tile is one stretch.
        width = self.rows if self.count > 1 else self.band
        for offset in range(0, self.band, width):
            piece_NTK = x_NMSK[:, :, self.sinks + offset : self.sinks + offset + width].flatten(1, 2)
            start = self.low + offset
            total_NTK[:, start : start + self.count * width] += piece_NTK


@dataclass(frozen=True)
class Band:
    """What a query sees, as in NUMERICS: its window and its document's sinks; and how many queries make a tile."""

    window: int
    sinks: int
    scale: float
    rows: int

    def tiles(self, length: int) -> list[Tile]:
        # Whole tiles behind the query's own, so that bands overlap in whole tiles.
        behind = -(-(self.window - 1) // self.rows) * self.rows
        tiles = []
        for first in range(0, length, self.rows):
            rows = min(self.rows, length - first)
            # Sinks that touch the band are part of it, so that no key is counted twice.
            far = first - behind > self.sinks
            tiles.append(Tile(first, rows, first - behind, self.sinks) if far else Tile(first, rows, 0, 0))
        return tiles

    def batches(self, length: int, most: int) -> list[Tile]:
        """The tiles of a document, neighbours of one shape joined up to `most` scores."""
        batches: list[Tile] = []
        for tile in self.tiles(length):
            last = batches[-1] if batches else None
            alike = last and (last.rows, last.band, last.sinks) == (tile.rows, tile.band, tile.sinks)
            if last and alike and last.size + tile.size <= most:
                batches[-1] = replace(last, count=last.count + 1)
            else:
                batches.append(tile)
        return batches

    def scores(self, length: int) -> int:
        """How many a document has, for one query head."""
        return sum(tile.size for tile in self.tiles(length))

    def mask(self, score_MRCS: Tensor, tile: Tile) -> None:
        """Set the scores of what a query may not see to −inf."""
        if self.window >= tile.first + tile.rows:  # nothing is too far away: only the last square needs a mask
            rule = (self.rows, 0, 0, self.rows, 0)
            score_MRCS = score_MRCS[..., -tile.rows :]
        else:
            rule = (self.rows, tile.first - tile.low, tile.sinks, self.window, 0 if tile.low else self.sinks)
        mask_CS = additive_mask(*rule, score_MRCS.dtype, score_MRCS.device)
        score_MRCS += mask_CS[: tile.rows, : score_MRCS.shape[-1]]


@lru_cache(maxsize=64)
def additive_mask(
    rows: int, before: int, kept: int, window: int, near_sinks: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """0 where allowed, −inf elsewhere: `kept` sinks, then a band that begins `before` keys ahead of the first query.

    near_sinks: how many keys at the start of the band are sinks. Depends on shapes alone, so a process makes few.
    """
    with torch.inference_mode(False):  # what is kept may serve training after inference
        query_C1 = torch.arange(rows, device=device)[:, None] + before
        key_S = torch.arange(-kept, before + rows, device=device)
        seen_CS = (query_C1 - key_S < window) | (key_S < near_sinks)
        hidden_CS = ~(seen_CS & (key_S <= query_C1))
        return torch.zeros(seen_CS.shape, dtype=dtype, device=device).masked_fill_(hidden_CS, -torch.inf)


def tiled_attention(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, *, window: int, sinks: int, scale: float) -> Tensor:
    """Attention of whole rows, each one document, to the last `window` tokens and the first `sinks`: (B, T, H, V).

    Time and memory are linear in T for a given window, forward and backward. First derivatives only.
    """
    return _TiledAttention.apply(
        q_BTHK, k_BTGK, v_BTGV, Band(window, sinks, scale, _rows_of_a_tile(window)), torch.is_grad_enabled()
    )


def kept_keys(length: int, window: int, sinks: int) -> float:
    """How many weights a query of a document of `length` keeps for the backward, on average; 0 where none is kept."""
    if min(length, window) > 2 * KEPT:  # more than that, in the mean of a document that long
        return 0.0
    rows = _rows_of_a_tile(window)
    length = max(1, min(length, 64 * (window + rows)))  # from there on the mean stays what it is
    keys = Band(window, sinks, 1.0, rows).scores(length) / length
    return keys if keys <= KEPT else 0.0


def _rows_of_a_tile(window: int) -> int:
    # Measured at 6 heads of 64: half a window is best for narrow windows, 256 for wide ones and for causal.
    return max(64, min(256, window // 2))


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, band: Band, gradients: bool) -> Tensor:
        """gradients: whether any is wanted, which the context does not know."""
        q_NRTK, k_NTK, v_NTV = _heads_first(q_BTHK, k_BTGK), *_heads_of_keys(k_BTGK, v_BTGV)
        o_NRTV = q_NRTK.new_empty(*q_NRTK.shape[:3], v_NTV.shape[-1])
        kept: list[Tensor] = []
        keep = gradients and any(ctx.needs_input_grad) and bool(kept_keys(q_NRTK.shape[2], band.window, band.sinks))
        for part, tile, (score, weight) in _walk(q_NRTK, band, buffers=2):
            if keep:
                weight = torch.empty_like(score)
                kept.append(weight)
            _attention_weights(score, weight, tile.queries(q_NRTK[part]), tile.keys(k_NTK[part]), tile, band)
            _put(tile.queries(o_NRTV[part]), torch.bmm(weight.flatten(1, 2), tile.keys(v_NTV[part])))
        ctx.save_for_backward(q_BTHK, k_BTGK, v_BTGV, *kept)
        ctx.band = band
        return _heads_last(o_NRTV, q_BTHK.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHV: Tensor) -> tuple[Tensor | None, ...]:
        """With weights P: dV = Pᵀ dO, dP = dO Vᵀ, dS = P ⊙ (dP − rowsum(dP ⊙ P)), dQ = dS K, dK = dSᵀ Q (× scale)."""
        q_BTHK, k_BTGK, v_BTGV, *kept = ctx.saved_tensors
        band: Band = ctx.band
        q_NRTK, k_NTK, v_NTV = _heads_first(q_BTHK, k_BTGK), *_heads_of_keys(k_BTGK, v_BTGV)
        grad_NRTV = _heads_first(grad_BTHV, v_BTGV)
        # A key collects from many tiles: in fp32, so that its gradient does not depend on how many.
        sums = torch.promote_types(q_BTHK.dtype, torch.float32)
        dq_NRTK = torch.empty_like(q_NRTK, memory_format=torch.contiguous_format)
        dk_NTK, dv_NTV = (x.new_zeros(x.shape, dtype=sums) for x in (k_NTK, v_NTV))
        for part, tile, (score, dweight, *spare) in _walk(q_NRTK, band, buffers=2 if kept else 3):
            q_MRCK, k_MSK = tile.queries(q_NRTK[part]), tile.keys(k_NTK[part])
            if kept:
                weight = kept.pop(0)
            else:
                weight = spare[0]
                _attention_weights(score, weight, q_MRCK, k_MSK, tile, band)
            grad_MCV = _rows(tile.queries(grad_NRTV[part]))
            torch.bmm(grad_MCV, tile.keys(v_NTV[part]).mT, out=dweight.flatten(1, 2))
            torch._softmax_backward_data(dweight, weight, -1, weight.dtype, grad_input=score)
            _put(tile.queries(dq_NRTK[part]), torch.bmm(score.flatten(1, 2), k_MSK))
            tile.add_to_keys(dk_NTK[part], torch.bmm(score.flatten(1, 2).mT, _rows(q_MRCK)))
            tile.add_to_keys(dv_NTV[part], torch.bmm(weight.flatten(1, 2).mT, grad_MCV))
        batch = q_BTHK.shape[0]
        dq_BTHK = _heads_last(dq_NRTK.mul_(band.scale), batch)
        dk_BTGK = _heads_last(dk_NTK.mul_(band.scale).to(k_BTGK.dtype)[:, None], batch)
        return dq_BTHK, dk_BTGK, _heads_last(dv_NTV.to(v_BTGV.dtype)[:, None], batch), None, None


def _walk(q_NRTK: Tensor, band: Band, buffers: int) -> Iterator[tuple[slice, Tile, tuple[Tensor, ...]]]:
    """Every tile of every document and head, as many heads at a time as fit, with buffers (M, R, C, S) for it."""
    count, shared, length, _ = q_NRTK.shape
    largest = shared * max((tile.size for tile in band.tiles(length)), default=1)
    at_once = max(1, min(count, SCORES // largest))
    tiles = band.batches(length, most=SCORES // (at_once * shared))
    space = q_NRTK.new_empty(buffers, at_once * shared * max((tile.size for tile in tiles), default=0))
    for start in range(0, count, at_once):
        part = slice(start, min(start + at_once, count))
        for tile in tiles:
            size = (part.stop - start) * shared * tile.size
            shape = ((part.stop - start) * tile.count, shared, tile.rows, -1)
            yield part, tile, tuple(buffer[:size].view(shape) for buffer in space)


def _attention_weights(score: Tensor, weight: Tensor, q: Tensor, keys: Tensor, tile: Tile, band: Band) -> None:
    """Fill `score` and then `weight` (M, R, C, S) with its softmax; forward and backward get the same to the bit."""
    flat = score.flatten(1, 2)
    torch.baddbmm(flat, _rows(q), keys.mT, beta=0, alpha=band.scale, out=flat)
    band.mask(score, tile)
    torch.softmax(score, dim=-1, out=weight)


def _rows(x_NMRCK: Tensor) -> Tensor:
    return x_NMRCK.flatten(0, 1).flatten(1, 2)


def _put(target_NMRCK: Tensor, rows: Tensor) -> None:
    target_NMRCK.copy_(rows.view(target_NMRCK.shape))


def _heads_first(x_BTHK: Tensor, keys_BTGK: Tensor) -> Tensor:
    """(B, T, H, K) to (B·G, R, T, K), a view where strides allow it."""
    return x_BTHK.unflatten(2, (keys_BTGK.shape[2], -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)


def _heads_last(x_NRTK: Tensor, batch: int) -> Tensor:
    """The inverse of `_heads_first`."""
    return x_NRTK.unflatten(0, (batch, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _heads_of_keys(*xs_BTGK: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2).flatten(0, 1) for x in xs_BTGK)
