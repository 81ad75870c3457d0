"""Sliding-window attention (arXiv 2004.05150, 2310.06825) with attention sinks (arXiv 2309.17453)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from swamla.errors import require
from swamla.model.mixers.mha import MHA, KVState, MHAConfig
from swamla.model.mixers.mixer import filled_mask, without_padding, write_at
from swamla.ops.attention import (
    WINDOWED_BACKENDS,
    cached_attention,
    kept_keys,
    prepare_attention,
    resolve_backend,
    windowed_attention,
)
from swamla.ops.attention.trial import AttentionTrial
from swamla.ops.layout import Layout
from swamla.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class SWAConfig(MHAConfig):
    """Sliding-window attention: multi-head attention that looks back over a window only.

    n_heads: query heads.
    n_kv_heads: heads of keys and values, each shared by a group of query heads; as many as n_heads by default.
    head_dim: width of a head, width / n_heads by default.
    rope: rotary positions, or none (the model may have learned ones).
    bias: whether projections add one.
    backend: auto, reference, torch, tiles, sdpa, or on CUDA flex.
    window: how many of the last tokens a token sees, itself included.
    sinks: how many of its document's first tokens it sees besides.
    """

    kind: ClassVar[str] = "swa"
    sign: ClassVar[str] = "S"
    style: ClassVar[str] = "black on cyan"
    is_local: ClassVar[bool] = True
    BACKENDS: ClassVar[tuple[str, ...]] = WINDOWED_BACKENDS
    window: int = 256
    sinks: int = 4

    @classmethod
    def example(cls) -> Self:
        """Two heads and a short window, for a model of width 64."""
        return cls(n_heads=2, window=16)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.window > 0, "window", self.window, "must be > 0, e.g. 256")
        require(self.sinks >= 0, "sinks", self.sinks, "must be >= 0, e.g. 4")

    def build(self, width: int) -> "SWA":
        """The module."""
        return SWA(self, width)

    @property
    def sees_order(self) -> bool:
        """By the window at least."""
        return True

    def backends(self, device: torch.device, width: int, dtype: torch.dtype) -> dict[str, str]:
        """What computes which op on `device`. Raises `MissingBackendError` for a backend that cannot."""
        return {"attention": resolve_backend(self.backend, device, windowed=True)}

    def trial(self, width: int) -> AttentionTrial | None:
        """What to race where the backend is left to "auto"."""
        causal = super().trial(width)
        return causal and replace(causal, window=self.window, sinks=self.sinks)

    def prepare(self, seq: Layout, width: int) -> None:
        """Make masks and tables eagerly, so that the compiled forward has no graph break."""
        prepare_attention(seq, self.backend, window=self.window, sinks=self.sinks)

    def kept_weights(self, width: int, length: int, *, bf16: bool) -> float:
        """Attention weights that a token of a document keeps for the backward pass on a CPU, of all heads."""
        if self.backend == "sdpa":  # which keeps none, but every key and value as often as a band holds it
            return 4.0 * self.kv_heads * self.key_dim(width)
        return self.n_heads * kept_keys(length, self.window, self.sinks)

    def pairs(self, length: int) -> int:
        """Pairs of a query and a key that it sees: in its window, and sinks before that."""
        beyond = max(0, length - self.window)
        in_window = length * (length + 1) // 2 - beyond * (beyond + 1) // 2
        reach = min(self.sinks, beyond)
        return in_window + reach * (reach + 1) // 2 + (beyond - reach) * self.sinks

    def state_bytes(self, width: int, length: int, element_bytes: int) -> int:
        """Bytes of the state of one sequence: a ring, whatever the length."""
        return 2 * (self.window + self.sinks) * self.kv_heads * self.key_dim(width) * element_bytes


class SWA(MHA):
    """Attention whose cost and state do not grow with the distance to the document's start."""

    config: SWAConfig

    def forward(self, x_BTD: Tensor, seq: Layout) -> Tensor:
        q, k, v = self.project(x_BTD, seq)
        config = self.config
        band = {"window": config.window, "sinks": config.sinks}
        o = windowed_attention(q, k, v, seq, **band, scale=self.scale, backend=config.backend)
        return self.o_proj(o.flatten(2))

    def init_state(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str) -> KVState:
        # Slots 0 … sinks − 1 hold the sinks, the others a ring of the last `window` tokens behind them.
        shape = (batch, self.config.sinks + self.config.window, self.config.kv_heads, self.key_dim)
        k, v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return KVState(k, v)

    def step(self, x_BTD: Tensor, state: KVState, seq: Layout) -> Tensor:
        q, k, v = self.project(without_padding(x_BTD, seq), seq)
        time = x_BTD.shape[1]
        if time == 1 and not seq.padded:
            return self.o_proj(self._step_one(q, k, v, state, seq).flatten(2))
        if seq.held is not None and (seq.held == 0 or time >= self.config.window):
            return self.o_proj(self._step_many(q, k, v, state, seq.held, seq).flatten(2))
        pieces = range(0, time, self.config.window)  # within a window no two tokens share a slot of the ring
        out = [self._step_piece(q, k, v, state, seq, begin, begin + self.config.window) for begin in pieces]
        return self.o_proj(torch.cat(out, dim=1).flatten(2))

    def _step_one(self, q: Tensor, k: Tensor, v: Tensor, state: KVState, seq: Layout) -> Tensor:
        """A token takes the place of the one that has just left the window, and then sees all that is there."""
        size = state.k_BSGK.shape[1]
        if seq.held is None:  # the places that are not filled yet are the last ones
            slot_B1 = seq.table(("slot", size, self.config.sinks), lambda: self._slot(seq.position_BT))
            write_at(state.k_BSGK, slot_B1, k)
            write_at(state.v_BSGK, slot_B1, v)
            allowed = seq.table(("ring", size), lambda: filled_mask(seq, size))
            held_k, held_v = state.k_BSGK.to(q.dtype), state.v_BSGK.to(q.dtype)
            return cached_attention(q, held_k, held_v, allowed, scale=self.scale)
        sinks, window = self.config.sinks, self.config.window
        slot = seq.held if seq.held < sinks else sinks + (seq.held - sinks) % window
        state.k_BSGK[:, slot : slot + 1] = k
        state.v_BSGK[:, slot : slot + 1] = v
        filled = min(seq.end, size)
        held_k, held_v = state.k_BSGK[:, :filled].to(q.dtype), state.v_BSGK[:, :filled].to(q.dtype)
        return cached_attention(q, held_k, held_v, None, scale=self.scale)

    def _step_many(self, q: Tensor, k: Tensor, v: Tensor, state: KVState, held: int, seq: Layout) -> Tensor:
        """Many tokens attend in bands, behind those that the ring holds put in order; then the last of them enter it.

        Sinks that lie further back than the window stand right before it: farther from every query than the window
        reaches all the same, so that the mask is that of a whole row.
        """
        config, batch = self.config, k.shape[0]
        k_line = torch.cat((self._in_order(state.k_BSGK, held).to(k.dtype), k), dim=1)
        v_line = torch.cat((self._in_order(state.v_BSGK, held).to(v.dtype), v), dim=1)
        behind = k_line.shape[1] - k.shape[1]  # their queries are zeros, and what comes of them is left out
        line = seq.table(("line", behind), lambda: Layout.one_document_per_row(batch, k_line.shape[1], device=k.device))
        q_line = F.pad(q, (0, 0, 0, 0, behind, 0))
        band = {"window": config.window, "sinks": config.sinks}
        o = windowed_attention(q_line, k_line, v_line, line, **band, scale=self.scale, backend=config.backend)
        for ring, new in ((state.k_BSGK, k), (state.v_BSGK, v)):
            self._enter(ring, new, held)
        return o[:, behind:]

    def _in_order(self, ring_BSGK: Tensor, held: int) -> Tensor:
        """What the ring holds after `held` tokens: sinks, then the others from the oldest on."""
        sinks, window = self.config.sinks, self.config.window
        if held <= sinks + window:
            return ring_BSGK[:, :held]
        oldest = sinks + (held - sinks) % window
        return torch.cat((ring_BSGK[:, :sinks], ring_BSGK[:, oldest:], ring_BSGK[:, sinks:oldest]), dim=1)

    def _enter(self, ring_BSGK: Tensor, new_BTGK: Tensor, held: int) -> None:
        """Write those of the tokens from position `held` on that stay: sinks, and the last `window` of the others."""
        sinks, window = self.config.sinks, self.config.window
        end = held + new_BTGK.shape[1]
        if held < sinks:
            last = min(sinks, end)
            ring_BSGK[:, held:last] = new_BTGK[:, : last - held]
        position = max(held, sinks, end - window)
        while position < end:  # twice at most: up to the ring's end, and from its start
            slot = (position - sinks) % window
            count = min(end - position, window - slot)
            ring_BSGK[:, sinks + slot : sinks + slot + count] = new_BTGK[:, position - held : position - held + count]
            position += count

    def _step_piece(self, q: Tensor, k: Tensor, v: Tensor, state: KVState, seq: Layout, begin: int, end: int) -> Tensor:
        """New tokens [begin, end) see the ring as it was and each other, then enter it."""
        q, k, v = q[:, begin:end], k[:, begin:end], v[:, begin:end]
        position_BT, valid_BT = seq.position_BT[:, begin:end], seq.document_BT[:, begin:end] >= 0
        held_BS = self._held(position_BT[:, 0])
        k_all = torch.cat((state.k_BSGK.to(k.dtype), k), dim=1)
        v_all = torch.cat((state.v_BSGK.to(v.dtype), v), dim=1)
        source_BS = torch.cat((held_BS, position_BT), dim=1)
        distance_BTS = position_BT[:, :, None] - source_BS[:, None, :]
        near_BTS = (distance_BTS < self.config.window) | (source_BS < self.config.sinks)[:, None, :]
        allowed_BTS = (source_BS >= 0)[:, None, :] & (distance_BTS >= 0) & near_BTS
        slot_BT = self._slot(position_BT)
        for ring, new in ((state.k_BSGK, k), (state.v_BSGK, v)):
            kept = ring.gather(1, slot_BT[..., None, None].expand_as(new))
            write_at(ring, slot_BT, torch.where(valid_BT[..., None, None], new.to(ring.dtype), kept))
        return cached_attention(q, k_all, v_all, allowed_BTS, scale=self.scale)

    def _slot(self, position: Tensor) -> Tensor:
        """Where the ring keeps the token at `position`."""
        sinks, window = self.config.sinks, self.config.window
        return torch.where(position < sinks, position, sinks + (position - sinks) % window)

    def _held(self, length_B: Tensor) -> Tensor:
        """(B, sinks + window): the position that each slot holds after `length_B` tokens, -1 where none."""
        sinks, window = self.config.sinks, self.config.window
        slot_S = torch.arange(sinks + window, device=length_B.device)
        last_B1 = length_B[:, None] - 1
        in_ring = last_B1 - (last_B1 - slot_S) % window
        held_BS = torch.where(slot_S < sinks, slot_S, in_ring)
        return torch.where((held_BS <= last_B1) & (held_BS >= torch.where(slot_S < sinks, 0, sinks)), held_BS, -1)
