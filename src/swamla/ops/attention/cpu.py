"""Attention as plain matrix products over tiles of queries: the backend "tiles", a CPU's fast path.

A tile is a block of consecutive queries and the keys that any of them attends to: the document's sinks, if they lie
before the window, and one band. A tile takes a matmul, a softmax and a matmul; tiles of equal shape form one batch.
Where queries attend to few keys, attention weights are saved for the backward pass, which saves a quarter of its time.
Elsewhere they are recomputed, so that no quadratic memory is needed. In bf16 this runs at the rate of the CPU's matmul.
Unlike in `sdpa.py`, scores are rounded to bf16 (as in every eager attention under autocast) and written to memory.
Which backend is faster depends on the machine and the documents' lengths. Causal attention is the case of a window as
long as the document. A learned sink logit is the score of a virtual key before the document's first token: its key and
value are zeros, and the logit is written in place of its scores.

Shapes in this file: N (documents × key heads), R query heads that share a key head, C queries and S keys of a tile,
M (documents × key heads × tiles).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from swamla.ops.attention.reference import Window
from swamla.ops.graphs import outside_graphs
from swamla.ops.layout import Layout

SCORES = 4_000_000  # elements of one batch of tiles: two or three such buffers are in use, about the size of the caches
KEPT = 768  # weights are saved for the backward pass up to so many keys per query: 1.5 KB per query and head in bf16


@outside_graphs
def attend_in_tiles(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    seq: Layout,
    window: Window,
    scale: float,
    sink_logit_H: Tensor | None = None,
) -> Tensor:
    """o (B, T, H, V): attention within each document, under its window."""
    attend = partial(tiled_attention, window=window, scale=scale, sink_logit_H=sink_logit_H)
    return each_document(attend, q_BTHK, k_BTGK, v_BTGV, seq)


def each_document(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, seq: Layout
) -> Tensor:
    """Call `attend` on each run of `seq.runs`, as tensors (count, length, heads, width), and concatenate the outputs.

    No softmax spans two documents, and the cost is the sum over documents, not that of the whole row.
    """
    if seq.whole_rows:
        return attend(q_BTHK, k_BTGK, v_BTGV)
    sizes = [count * length for count, length in seq.runs]
    split = zip(*(torch.split(x.flatten(0, 1), sizes) for x in (q_BTHK, k_BTGK, v_BTGV)), strict=True)
    outputs = [
        attend(*(x.unflatten(0, run) for x in qkv)).flatten(0, 1) for run, qkv in zip(seq.runs, split, strict=True)
    ]
    return torch.cat(outputs).unflatten(0, seq.shape) if outputs else torch.empty_like(q_BTHK[..., : v_BTGV.shape[-1]])


@dataclass(frozen=True)
class Tile:
    """`count` consecutive tiles of C = `rows` queries each, the first one's at [first, first + rows).

    The first tile's keys are the virtual ones, the document's first `sinks` tokens and the band [low, first + rows).
    The band of each following tile begins `rows` later. Keys and values of a document begin with the `virtual` ones.
    """

    first: int
    rows: int
    low: int
    sinks: int
    virtual: int = 0
    count: int = 1

    @property
    def apart(self) -> int:
        """Keys before the band: virtual ones and sinks."""
        return self.virtual + self.sinks

    @property
    def band(self) -> int:
        """Keys of the band."""
        return self.first + self.rows - self.low

    @property
    def size(self) -> int:
        """Scores of all `count` tiles, for one query head."""
        return self.count * self.rows * (self.apart + self.band)

    def queries(self, x_NRTK: Tensor) -> Tensor:
        """(N, count, R, C, K), a view."""
        stop = self.first + self.count * self.rows
        return x_NRTK[:, :, self.first : stop].unflatten(2, (self.count, self.rows)).transpose(1, 2)

    def keys(self, x_NTK: Tensor) -> Tensor:
        """(M, S, K): virtual keys and sinks, then the band."""
        if self.count == 1 and (
            not self.apart or not self.low
        ):  # a band from the first token on has no sinks before it
            return x_NTK[:, self.low : self.apart + self.low + self.band]
        low = self.virtual + self.low
        stop = low + self.band + (self.count - 1) * self.rows
        band_NMSK = x_NTK[:, low:stop].unfold(1, self.band, self.rows).transpose(2, 3)
        apart_NMSK = x_NTK[:, None, : self.apart].expand(-1, self.count, -1, -1)
        return torch.cat([apart_NMSK, band_NMSK], dim=2).flatten(0, 1)

    def add_to_keys(self, total_NTK: Tensor, x_MSK: Tensor) -> None:
        """The transpose of `keys`: add each key's gradient to that of its token. Virtual keys have none.

        Called with the tiles in order. The tiles' own tokens are new to the total: they are written, not added.
        """
        x_NMSK, total_NTK = x_MSK.unflatten(0, (-1, self.count))[:, :, self.virtual :], total_NTK[:, self.virtual :]
        own_NMCK = total_NTK[:, self.first : self.first + self.count * self.rows].unflatten(1, (self.count, -1))
        own_NMCK.copy_(x_NMSK[:, :, -self.rows :])
        if self.sinks:
            total_NTK[:, : self.sinks].add_(x_NMSK[:, :, : self.sinks].sum(dim=1, dtype=total_NTK.dtype))
        # Bands overlap: add them `rows` keys at a time, for all tiles at once. A single tile is added at once.
        earlier = self.band - self.rows
        width = self.rows if self.count > 1 else earlier
        for offset in range(0, earlier, max(1, width)):
            piece_NMCK = x_NMSK[:, :, self.sinks + offset : self.sinks + offset + width]
            start = self.low + offset
            total_NTK[:, start : start + self.count * width].unflatten(1, (self.count, -1)).add_(piece_NMCK)


@dataclass(frozen=True)
class Band:
    """What a query attends to (its last `window` tokens and the first `sinks`), the scores' scale, queries per tile.

    virtual: 1 if there is a sink logit, whose key comes before all others.
    """

    window: int
    sinks: int
    scale: float
    rows: int
    virtual: int = 0

    def tiles(self, length: int) -> list[Tile]:
        """The tiles of a document, one by one."""
        # The band before a tile is a whole number of tiles, so that bands overlap by whole tiles.
        behind = -(-(self.window - 1) // self.rows) * self.rows
        tiles = []
        for first in range(0, length, self.rows):
            rows = min(self.rows, length - first)
            # Sinks that touch the band belong to it, so that no key counts twice.
            far = first - behind > self.sinks
            low, sinks = (first - behind, self.sinks) if far else (0, 0)
            tiles.append(Tile(first, rows, low, sinks, self.virtual))
        return tiles

    def batches(self, length: int, most: int) -> list[Tile]:
        """The tiles of a document, consecutive ones of equal shape joined up to `most` scores."""
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
        """Scores of a document, for one query head."""
        return sum(tile.size for tile in self.tiles(length))

    def mask(self, score_MRCS: Tensor, tile: Tile) -> None:
        """Set the scores of masked keys to −inf, in place."""
        if self.window >= tile.first + tile.rows:  # all earlier keys are in the window: mask only the tile's own square
            shape = MaskShape(self.rows, window=self.rows)
            score_MRCS = score_MRCS[..., -tile.rows :]
        else:
            near = 0 if tile.low else self.sinks
            shape = MaskShape(self.rows, self.window, tile.first - tile.low, tile.apart, near_sinks=near)
        mask_CS = additive_mask(shape, score_MRCS.dtype, score_MRCS.device)
        score_MRCS += mask_CS[: tile.rows, : score_MRCS.shape[-1]]


class MaskShape(NamedTuple):
    """The mask of a block of queries. Its keys are `sinks` sinks, `before` earlier keys, then the `rows` own ones.

    window: how many of the last keys a query attends to.  near_sinks: how many of the keys after `sinks` are sinks too.
    """

    rows: int
    window: int
    before: int = 0
    sinks: int = 0
    near_sinks: int = 0


@lru_cache(maxsize=64)
def additive_mask(shape: MaskShape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(C, S): 0 for allowed keys, −inf for masked ones. Cached, since it depends on few shapes."""
    rows, window, before, sinks, near_sinks = shape
    with torch.inference_mode(False):  # a mask that is cached in inference may be used in training
        query_C1 = torch.arange(rows, device=device)[:, None] + before
        key_S = torch.arange(-sinks, before + rows, device=device)
        seen_CS = (query_C1 - key_S < window) | (key_S < near_sinks)
        hidden_CS = ~(seen_CS & (key_S <= query_C1))
        return torch.zeros(seen_CS.shape, dtype=dtype, device=device).masked_fill_(hidden_CS, -torch.inf)


def tiled_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    window: Window,
    scale: float,
    sink_logit_H: Tensor | None = None,
) -> Tensor:
    """o (B, T, H, V) of rows that are one document each.

    Time and memory are linear in T for a given window, forward and backward. First derivatives only.
    """
    size = q_BTHK.shape[1] if window.size is None else window.size
    band = Band(size, window.sinks, scale, _rows_of_a_tile(size), virtual=int(sink_logit_H is not None))
    return _TiledAttention.apply(q_BTHK, k_BTGK, v_BTGV, sink_logit_H, band, torch.is_grad_enabled())


def kept_keys(length: int, window: int, sinks: int, virtual: int = 0) -> float:
    """Attention weights per query that are saved for the backward pass, averaged over a document; 0 if none are."""
    if min(length, window) > 2 * KEPT:  # then the average exceeds KEPT
        return 0.0
    rows = _rows_of_a_tile(window)
    length = max(1, min(length, 64 * (window + rows)))  # the average of a longer document is the same
    keys = Band(window, sinks, 1.0, rows, virtual).scores(length) / length
    return keys if keys <= KEPT else 0.0


def _rows_of_a_tile(window: int) -> int:
    # Measured with 6 heads of width 64: half the window is fastest for narrow windows, 256 for wide ones and causal.
    return max(64, min(256, window // 2))


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTHK: Tensor,
        k_BTGK: Tensor,
        v_BTGV: Tensor,
        sink_logit_H: Tensor | None,
        band: Band,
        gradients: bool,
    ) -> Tensor:
        """gradients: whether autograd records, which `ctx.needs_input_grad` does not say."""
        q_NRTK, k_NTK, v_NTV = _heads_first(q_BTHK, k_BTGK.shape[2]), *_heads_of_keys(k_BTGK, v_BTGV, band.virtual)
        o_NRTV = q_NRTK.new_empty(*q_NRTK.shape[:3], v_NTV.shape[-1])
        sink_NR = None
        if sink_logit_H is not None:
            sink_NR = sink_logit_H.to(q_NRTK.dtype).view(-1, q_NRTK.shape[1]).repeat(q_BTHK.shape[0], 1)
        kept: list[Tensor] = []
        few = bool(kept_keys(q_NRTK.shape[2], band.window, band.sinks, band.virtual))
        keep = few and gradients and any(ctx.needs_input_grad)
        for part, tile, (score, weight) in _walk(q_NRTK, band, buffers=2):
            if keep:
                weight = torch.empty_like(score)
                kept.append(weight)
            sink_MR = _of_tiles(sink_NR, part, tile)
            _attention_weights(score, weight, tile.queries(q_NRTK[part]), tile.keys(k_NTK[part]), sink_MR, tile, band)
            _write(tile.queries(o_NRTV[part]), torch.bmm(weight.flatten(1, 2), tile.keys(v_NTV[part])))
        ctx.save_for_backward(q_NRTK, k_NTK, v_NTV, sink_NR, *kept)
        ctx.band, ctx.batch = band, q_BTHK.shape[0]
        ctx.sink_dtype = None if sink_logit_H is None else sink_logit_H.dtype
        return _heads_last(o_NRTV, q_BTHK.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHV: Tensor) -> tuple[Tensor | None, ...]:
        """With weights P: dV = Pᵀ dO, dP = dO Vᵀ, dS = P ⊙ (dP − rowsum(dP ⊙ P)), dQ = dS K, dK = dSᵀ Q (× scale).

        The gradient of a sink logit is the sum over the queries of dS at the virtual key.
        """
        q_NRTK, k_NTK, v_NTV, sink_NR, *kept = ctx.saved_tensors
        band: Band = ctx.band
        grad_NRTV = _heads_first(grad_BTHV, groups=len(k_NTK) // ctx.batch)
        # A key's gradient is a sum over many tiles: in fp32, so that its error does not grow with their number.
        sums = torch.promote_types(q_NRTK.dtype, torch.float32)
        dq_NRTK = torch.empty_like(q_NRTK, memory_format=torch.contiguous_format)
        dk_NTK, dv_NTV = (x.new_empty(x.shape, dtype=sums) for x in (k_NTK, v_NTV))
        d_sink_NR = None if sink_NR is None else torch.zeros_like(sink_NR, dtype=sums)
        for part, tile, (score, dweight, *spare) in _walk(q_NRTK, band, buffers=2 if kept else 3):
            q_MRCK, k_MSK = tile.queries(q_NRTK[part]), tile.keys(k_NTK[part])
            if kept:
                weight = kept.pop(0)
            else:
                weight = spare[0]
                _attention_weights(score, weight, q_MRCK, k_MSK, _of_tiles(sink_NR, part, tile), tile, band)
            grad_MCV = _rows(tile.queries(grad_NRTV[part]))
            torch.bmm(grad_MCV, tile.keys(v_NTV[part]).mT, out=dweight.flatten(1, 2))
            torch._softmax_backward_data(dweight, weight, -1, weight.dtype, grad_input=score)
            if d_sink_NR is not None:
                d_sink_NR[part] += score[..., 0].unflatten(0, (-1, tile.count)).sum(dim=(1, 3), dtype=sums)
            _write(tile.queries(dq_NRTK[part]), _scaled_bmm(score.flatten(1, 2), k_MSK, band.scale))
            tile.add_to_keys(dk_NTK[part], _scaled_bmm(score.flatten(1, 2).mT, _rows(q_MRCK), band.scale))
            tile.add_to_keys(dv_NTV[part], torch.bmm(weight.flatten(1, 2).mT, grad_MCV))
        dk_NTK, dv_NTV = (x[:, band.virtual :].to(k_NTK.dtype) for x in (dk_NTK, dv_NTV))
        d_sink_H = None if d_sink_NR is None else d_sink_NR.unflatten(0, (ctx.batch, -1)).sum(0).flatten()
        found = (_heads_last(x_NRTK, ctx.batch) for x_NRTK in (dq_NRTK, dk_NTK[:, None], dv_NTV[:, None]))
        return *found, d_sink_H if d_sink_H is None else d_sink_H.to(ctx.sink_dtype), None, None


def _walk(q_NRTK: Tensor, band: Band, buffers: int) -> Iterator[tuple[slice, Tile, tuple[Tensor, ...]]]:
    """Each batch of tiles, for as many documents and heads at a time as SCORES allows, with buffers (M, R, C, S)."""
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


def _of_tiles(sink_NR: Tensor | None, part: slice, tile: Tile) -> Tensor | None:
    """(M, R): the sink logits of each tile's query heads."""
    return None if sink_NR is None else sink_NR[part].repeat_interleave(tile.count, dim=0)


def _attention_weights(
    score: Tensor, weight: Tensor, q: Tensor, keys: Tensor, sink_MR: Tensor | None, tile: Tile, band: Band
) -> None:
    """Write the scores into `score` and their softmax into `weight` (M, R, C, S); bitwise equal in both passes."""
    flat = score.flatten(1, 2)
    torch.baddbmm(flat, _rows(q), keys.mT, beta=0, alpha=band.scale, out=flat)
    band.mask(score, tile)
    if sink_MR is not None:
        score[..., 0] = sink_MR[..., None]
    torch.softmax(score, dim=-1, out=weight)


def _rows(x_NMRCK: Tensor) -> Tensor:
    return x_NMRCK.flatten(0, 1).flatten(1, 2)


def _write(target_NMRCK: Tensor, rows: Tensor) -> None:
    target_NMRCK.copy_(rows.view(target_NMRCK.shape))


def _scaled_bmm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """a b · scale, without a pass for the factor."""
    product = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return torch.baddbmm(product, a, b, beta=0, alpha=scale, out=product)


def _heads_first(x_BTHK: Tensor, groups: int) -> Tensor:
    """(B, T, H, K) to (B·G, R, T, K), a view where strides allow it."""
    return x_BTHK.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)


def _heads_last(x_NRTK: Tensor, batch: int) -> Tensor:
    """The inverse of `_heads_first`."""
    return x_NRTK.unflatten(0, (batch, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _heads_of_keys(k_BTGK: Tensor, v_BTGV: Tensor, virtual: int) -> tuple[Tensor, Tensor]:
    """(N, T, K) and (N, T, V), after `virtual` keys and values of zeros."""
    k_NTK, v_NTV = (x.transpose(1, 2).flatten(0, 1) for x in (k_BTGK, v_BTGV))
    return (F.pad(k_NTK, (0, 0, 1, 0)), F.pad(v_NTV, (0, 0, 1, 0))) if virtual else (k_NTK, v_NTV)
