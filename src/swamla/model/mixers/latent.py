"""Attention with keys and values expanded from one latent, without positions: replaces GPT-2's attention."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from swamla.errors import require
from swamla.model.mixers.explanation import Explanation, by_head
from swamla.model.mixers.mixer import (
    State,
    absorb,
    append,
    cached_causal_attention,
    causal_mask,
    min_tokens_to_expand,
    without_padding,
)
from swamla.model.mixers.softmax import Heads, SoftmaxConfig, SoftmaxMixer, softmax_weights
from swamla.ops.attention import causal_attention
from swamla.ops.attention.cached import attend_to_latents
from swamla.ops.attention.reference import allowed_mask
from swamla.ops.layout import Layout
from swamla.ops.linear import matrix_of
from swamla.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class LatentConfig(SoftmaxConfig):
    """Latent attention without positions of its own; the model may have learned ones.

    n_heads: heads.
    n_latent: width of the latent, and of all queries and of all keys together; half the model's width by default.
    bias: whether projections have one, as in GPT-2.
    backend: auto, reference, torch, tiles, sdpa, or on CUDA flex, flash or cudnn.
    """

    kind: ClassVar[str] = "latent"
    sign: ClassVar[str] = "L"
    ranks: ClassVar[tuple[str, ...]] = ("n_latent",)
    style: ClassVar[str] = "black on blue"
    n_heads: int
    n_latent: int | None = None
    bias: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.n_latent is None or (self.n_latent > 0 and self.n_latent % self.n_heads == 0)
        require(fits, "n_latent", self.n_latent, f"must be a multiple of n_heads = {self.n_heads}")

    def latent_dim(self, width: int) -> int:
        """Width of the latent in a model of `width`. Raises `ConfigError` if the latent or the heads do not fit."""
        require(width % self.n_heads == 0, "n_heads", self.n_heads, f"must divide the width {width}")
        if self.n_latent is None:
            half = width // 2
            allowed = f"must divide half the width, {half}, or give `n_latent`"
            require(half > 0 and half % self.n_heads == 0, "n_heads", self.n_heads, allowed)
            return half
        allowed = f"a latent larger than the width {width} compresses nothing"
        require(self.n_latent <= width, "n_latent", self.n_latent, allowed)
        return self.n_latent

    def build(self, width: int) -> "LatentAttention":
        """The module."""
        return LatentAttention(self, width)

    def heads(self, width: int) -> Heads:
        """The heads in a model of `width`. Raises `ConfigError` where they do not fit it."""
        return Heads(self.n_heads, self.latent_dim(width) // self.n_heads, width // self.n_heads)

    def projections(self, width: int) -> dict[str, dict[str, int]]:
        """Queries and the latent; keys and values."""
        latent = self.latent_dim(width)
        return {"qc_proj.weight": {"q": latent, "c": latent}, "kv_proj.weight": {"k": latent, "v": width}}

    def projection_weights(self, width: int) -> int:
        """Parameters of the projection matrices."""
        latent = self.latent_dim(width)
        return 2 * width * latent + latent * (latent + width) + width * width

    def n_parameters(self, width: int) -> int:
        """Parameters of the module."""
        return self.projection_weights(width) + self.bias * (3 * self.latent_dim(width) + 2 * width)

    def state_settings(self, width: int) -> dict[str, int]:
        """The width of the latent."""
        return {"n_latent": self.latent_dim(width)}

    def state_bytes(self, width: int, length: int, element_bytes: int) -> int:
        """Bytes of the state of one sequence that may grow to `length` tokens: the latents."""
        return length * self.latent_dim(width) * element_bytes


@dataclass
class LatentState(State):
    """The latent of each token, (B, max_len, R)."""

    latent_BSR: Tensor


class LatentAttention(SoftmaxMixer[LatentState]):
    """c = W_c x, q = W_q x, k = W_k c, v = W_v c, with heads of R / H for queries and keys and D / H for values.

    `forward` expands keys and values. `step` absorbs the expansion into queries and outputs and attends to the cached
    latents directly. Both are the same function, biases included: the keys' bias adds one constant to all scores of a
    query, to which softmax is invariant, and the values' bias is averaged with weights that sum to 1.
    """

    config: LatentConfig

    def __init__(self, config: LatentConfig, width: int) -> None:
        super().__init__(config, width)
        self.latent_dim = config.latent_dim(width)
        self.key_dim = self.latent_dim // config.n_heads
        self.qc_proj = nn.Linear(width, 2 * self.latent_dim, bias=config.bias)
        self.kv_proj = nn.Linear(self.latent_dim, self.latent_dim + width, bias=config.bias)
        self.o_proj = nn.Linear(width, width, bias=config.bias)
        self.min_to_expand = min_tokens_to_expand(self.latent_dim, self.key_dim + width // config.n_heads)

    def project(self, x_BTD: Tensor, seq: Layout) -> tuple[Tensor, Tensor]:
        """Queries (B, T, H, K) and the latent (B, T, R)."""
        q, latent = self.qc_proj(x_BTD).chunk(2, dim=-1)
        return q.unflatten(-1, (-1, self.key_dim)), latent

    def expand(self, latent_BTR: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (B, T, H, K) and values (B, T, H, V) of every head."""
        k, v = self.kv_proj(latent_BTR).split((self.latent_dim, self.width), dim=-1)
        return k.unflatten(-1, (-1, self.key_dim)), v.unflatten(-1, (self.config.n_heads, -1))

    def forward(self, x_BTD: Tensor, seq: Layout) -> Tensor:
        q, latent = self.project(x_BTD, seq)
        k, v = self.expand(latent)
        return self.o_proj(causal_attention(q, k, v, seq, scale=self.scale, backend=self.config.backend).flatten(2))

    def explain(self, x_BTD: Tensor, seq: Layout) -> Explanation:
        q, latent = self.project(without_padding(x_BTD, seq), seq)
        k, v = self.expand(latent)
        return Explanation(
            weights=softmax_weights(q, k, allowed_mask(seq), scale=self.scale),
            value_BSHV=v,
            gain_BTHV=None,
            out_HVD=by_head(matrix_of(self.o_proj), self.config.n_heads),
            bias_D=self.o_proj.bias,
        )

    def init_state(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str) -> LatentState:
        return LatentState(torch.zeros(batch, max_len, self.latent_dim, dtype=dtype, device=device))

    def step(self, x_BTD: Tensor, state: LatentState, seq: Layout) -> Tensor:
        q, latent = self.project(without_padding(x_BTD, seq), seq)
        append(state.latent_BSR, latent, seq)
        if seq.past is not None and x_BTD.shape[1] >= self.min_to_expand:
            k, v = self.expand(state.latent_BSR[:, : seq.end].to(q.dtype))
            return self.o_proj(
                cached_causal_attention(q, k, v, seq, scale=self.scale, backend=self.config.backend).flatten(2)
            )
        # W_k and W_v, (H, K, R) and (H, V, R): scores = (W_kᵀ q) · c and outputs = W_v (Σ p c) + b_v.
        w_k, w_v = (
            weight.unflatten(0, (self.config.n_heads, -1)).to(q.dtype)
            for weight in matrix_of(self.kv_proj).split((self.latent_dim, self.width))
        )
        o = attend_to_latents(absorb(q, w_k), state.latent_BSR, seq.end, causal_mask(seq), scale=self.scale)
        o_BTD = absorb(o, w_v.mT).flatten(2)
        return self.o_proj(o_BTD if self.kv_proj.bias is None else o_BTD + self.kv_proj.bias[self.latent_dim :])
