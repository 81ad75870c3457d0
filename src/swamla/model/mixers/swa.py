"""Sliding-window attention (arXiv 2004.05150, 2310.06825) with attention sinks (arXiv 2309.17453)."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from swamla.errors import require
from swamla.model.mixers.mha import MHA, KVState, MHAConfig
from swamla.model.mixers.mixer import filled_mask, without_padding, write_at
from swamla.ops.attention import (
    WINDOWED_BACKENDS,
    Window,
    cached_attention,
    describe_backend,
    kept_keys,
    prepare_attention,
    windowed_attention,
)
from swamla.ops.attention.trial import AttentionTrial
from swamla.ops.layout import Layout
from swamla.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class SWAConfig(MHAConfig):
    """Sliding-window attention: multi-head attention within a window.

    backend: auto, reference, torch, tiles, sdpa, or on CUDA flex or flash.
    window: how many of the last tokens a token sees, itself included.
    sinks: how many of its document's first tokens it sees as well.
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
        instead = not self.sink_logit or self.sinks == 0
        require(instead, "sinks", self.sinks, "must be 0 with sink_logit, which takes the place of kept tokens")

    def build(self, width: int) -> "SWA":
        """The module."""
        return SWA(self, width)

    @property
    def sees_order(self) -> bool:
        """True: the window depends on positions, even without rope."""
        return True

    def backends(self, device: torch.device, width: int, dtype: torch.dtype) -> dict[str, str]:
        """Op → backend. Raises `MissingBackendError` for a backend that cannot compute on `device`."""
        _, key, value = self.heads(width)
        return {"attention": describe_backend(self.backend, device, dtype, key=key, value=value, windowed=True)}

    def trial(self, width: int) -> AttentionTrial | None:
        """The attention whose backends are timed when the backend is "auto"."""
        causal = super().trial(width)
        return causal and replace(causal, window=self.window, sinks=self.sinks)

    def prepare(self, seq: Layout, width: int) -> None:
        """Build masks and tables eagerly, so that the compiled forward has no graph break."""
        _, key, value = self.heads(width)
        prepare_attention(seq, self.backend, Window(self.window, self.sinks), key=key, value=value)

    def kept_weights(self, width: int, length: int, *, bf16: bool) -> float:
        """Attention weights per token, over all heads, that are saved for the backward pass on a CPU."""
        if self.backend == "sdpa":  # it saves no weights, but the bands' keys and values: each token's are in two
            return 4.0 * self.kv_heads * self.key_dim(width)
        return self.n_heads * kept_keys(length, self.window, self.sinks, int(self.sink_logit))

    def pairs(self, length: int) -> int:
        """Pairs of query and key that the mask allows: those in the window, and sinks before it."""
        beyond = max(0, length - self.window)
        in_window = length * (length + 1) // 2 - beyond * (beyond + 1) // 2
        reach = min(self.sinks, beyond)
        return in_window + reach * (reach + 1) // 2 + (beyond - reach) * self.sinks

    def state_settings(self, width: int) -> dict[str, int]:
        """The window."""
        return {"window": self.window}

    def state_bytes(self, width: int, length: int, element_bytes: int) -> int:
        """Bytes of the state of one sequence: a ring buffer, independent of the length."""
        return 2 * (self.window + self.sinks) * self.kv_heads * self.key_dim(width) * element_bytes


class SWA(MHA):
    """Attention whose cost and state do not grow with the distance to the document's start."""

    config: SWAConfig

    def forward(self, x_BTD: Tensor, seq: Layout) -> Tensor:
        q, k, v, gate = self.project(x_BTD, seq)
        config = self.config
        band: dict[str, Any] = {"window": config.window, "sinks": config.sinks, **self.softmax}
        o = windowed_attention(q, k, v, seq, **band, backend=config.backend)
        return self.output(o, gate)

    @property
    def window(self) -> Window:
        """What a token attends to: the last tokens and its document's first ones."""
        return Window(self.config.window, self.config.sinks)

    def init_state(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str) -> KVState:
        # Slots 0 … sinks − 1 are the sinks', the others are a ring buffer of the last `window` later tokens.
        shape = (batch, self.config.sinks + self.config.window, self.config.kv_heads, self.key_dim)
        k, v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return KVState(k, v)

    def step(self, x_BTD: Tensor, state: KVState, seq: Layout) -> Tensor:
        q, k, v, gate = self.project(without_padding(x_BTD, seq), seq)
        time = x_BTD.shape[1]
        if torch.compiler.is_exporting():  # one graph for any number of tokens
            return self.output(self._step_chunk(q, k, v, state, seq.position_BT, seq.real_BT), gate)
        if time == 1 and not seq.padded:
            return self.output(self._step_one(q, k, v, state, seq), gate)
        if seq.past is not None and (seq.past == 0 or time >= self.config.window):
            return self.output(self._step_many(q, k, v, state, seq.past, seq), gate)
        outputs, valid_BT = [], seq.document_BT >= 0
        for begin in range(0, time, self.config.window):  # chunks bound the mask's memory
            chunk = slice(begin, begin + self.config.window)
            new = q[:, chunk], k[:, chunk], v[:, chunk]
            outputs.append(self._step_chunk(*new, state, seq.position_BT[:, chunk], valid_BT[:, chunk]))
        return self.output(torch.cat(outputs, dim=1), gate)

    def _step_one(self, q: Tensor, k: Tensor, v: Tensor, state: KVState, seq: Layout) -> Tensor:
        """One new token overwrites the one that has just left the window, then attends to the whole ring."""
        size = state.k_BSGK.shape[1]
        if seq.past is None:  # slots fill in order, so those after the position are empty
            slot_B1 = seq.table(("slot", size, self.config.sinks), lambda: self._slot(seq.position_BT))
            write_at(state.k_BSGK, slot_B1, k)
            write_at(state.v_BSGK, slot_B1, v)
            allowed = seq.table(("ring", size), lambda: filled_mask(seq, size))
            cached_k, cached_v = state.k_BSGK.to(q.dtype), state.v_BSGK.to(q.dtype)
            return cached_attention(q, cached_k, cached_v, allowed, **self.softmax)
        sinks, window = self.config.sinks, self.config.window
        slot = seq.past if seq.past < sinks else sinks + (seq.past - sinks) % window
        state.k_BSGK[:, slot : slot + 1] = k
        state.v_BSGK[:, slot : slot + 1] = v
        filled = min(seq.end, size)
        cached_k, cached_v = state.k_BSGK[:, :filled].to(q.dtype), state.v_BSGK[:, :filled].to(q.dtype)
        return cached_attention(q, cached_k, cached_v, None, **self.softmax)

    def _step_many(self, q: Tensor, k: Tensor, v: Tensor, state: KVState, length: int, seq: Layout) -> Tensor:
        """Windowed attention over the ring's tokens, in order, and the new tokens; the last new tokens enter the ring.

        Sinks from before the window are moved directly before it. They are still outside the window of every new query,
        so the mask of an ordinary row is correct.
        """
        config, batch = self.config, k.shape[0]
        k_line = torch.cat((self._in_order(state.k_BSGK, length).to(k.dtype), k), dim=1)
        v_line = torch.cat((self._in_order(state.v_BSGK, length).to(v.dtype), v), dim=1)
        cached = k_line.shape[1] - k.shape[1]  # cached tokens get zero queries, and their outputs are dropped
        line = seq.table(("line", cached), lambda: Layout.one_document_per_row(batch, k_line.shape[1], device=k.device))
        q_line = F.pad(q, (0, 0, 0, 0, cached, 0))
        band: dict[str, Any] = {"window": config.window, "sinks": config.sinks, **self.softmax}
        o = windowed_attention(q_line, k_line, v_line, line, **band, backend=config.backend)
        for ring, new in ((state.k_BSGK, k), (state.v_BSGK, v)):
            self._write(ring, new, length)
        return o[:, cached:]

    def _in_order(self, ring_BSGK: Tensor, length: int) -> Tensor:
        """The state's tokens after `length` tokens: sinks, then the ring from its oldest token on."""
        sinks, window = self.config.sinks, self.config.window
        if length <= sinks + window:
            return ring_BSGK[:, :length]
        oldest = sinks + (length - sinks) % window
        return torch.cat((ring_BSGK[:, :sinks], ring_BSGK[:, oldest:], ring_BSGK[:, sinks:oldest]), dim=1)

    def _write(self, ring_BSGK: Tensor, new_BTGK: Tensor, length: int) -> None:
        """Write the new tokens, which begin at position `length`: the sinks, and the last `window` other tokens."""
        sinks, window = self.config.sinks, self.config.window
        end = length + new_BTGK.shape[1]
        if length < sinks:
            last = min(sinks, end)
            ring_BSGK[:, length:last] = new_BTGK[:, : last - length]
        position = max(length, sinks, end - window)
        while position < end:  # at most twice: up to the ring's end, and from its start
            slot = (position - sinks) % window
            count = min(end - position, window - slot)
            first = position - length
            ring_BSGK[:, sinks + slot : sinks + slot + count] = new_BTGK[:, first : first + count]
            position += count

    def _step_chunk(
        self, q: Tensor, k: Tensor, v: Tensor, state: KVState, position_BT: Tensor, valid_BT: Tensor
    ) -> Tensor:
        """New tokens attend to the ring and to each other, then the last valid ones enter the ring."""
        cached_BS = self._positions(position_BT[:, 0])
        k_all = torch.cat((state.k_BSGK.to(k.dtype), k), dim=1)
        v_all = torch.cat((state.v_BSGK.to(v.dtype), v), dim=1)
        source_BS = torch.cat((cached_BS, position_BT), dim=1)
        distance_BTS = position_BT[:, :, None] - source_BS[:, None, :]
        near_BTS = (distance_BTS < self.config.window) | (source_BS < self.config.sinks)[:, None, :]
        allowed_BTS = (source_BS >= 0)[:, None, :] & (distance_BTS >= 0) & near_BTS
        first_B1 = position_BT[:, :1]
        index_BS = self._positions(first_B1.squeeze(1) + valid_BT.sum(dim=1)) - first_B1  # of the slots' new tokens
        is_new_BS11, index_BS11 = (index_BS >= 0)[..., None, None], index_BS.clamp(min=0)[..., None, None]
        for ring, new in ((state.k_BSGK, k), (state.v_BSGK, v)):
            entering = new.gather(1, index_BS11.expand(-1, -1, *new.shape[2:]))
            ring.copy_(torch.where(is_new_BS11, entering.to(ring.dtype), ring))
        return cached_attention(q, k_all, v_all, allowed_BTS, **self.softmax)

    def _slot(self, position: Tensor) -> Tensor:
        """The slot of the token at `position`."""
        sinks, window = self.config.sinks, self.config.window
        return torch.where(position < sinks, position, sinks + (position - sinks) % window)

    def _positions(self, length_B: Tensor) -> Tensor:
        """(B, sinks + window): the position of each slot's token after `length_B` tokens, -1 for an empty slot."""
        sinks, window = self.config.sinks, self.config.window
        slot_S = torch.arange(sinks + window, device=length_B.device)
        last_B1 = length_B[:, None] - 1
        in_ring = last_B1 - (last_B1 - slot_S) % window
        position_BS = torch.where(slot_S < sinks, slot_S, in_ring)
        first_S = torch.where(slot_S < sinks, 0, sinks)
        return torch.where((position_BS <= last_B1) & (position_BS >= first_S), position_BS, -1)
