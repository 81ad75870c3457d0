"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values from one latent."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

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
from swamla.model.norm import RMSNorm
from swamla.model.rope import RopeConfig
from swamla.ops.attention import causal_attention
from swamla.ops.attention.cached import attend_to_latents
from swamla.ops.attention.reference import allowed_mask
from swamla.ops.layout import Layout
from swamla.ops.linear import matrix_of
from swamla.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class MLAConfig(SoftmaxConfig):
    """Multi-head latent attention, its fields named as in DeepSeek's configs.

    n_heads: heads.
    kv_lora_rank: width of the latent that keys and values are expanded from.
    q_lora_rank: width of the latent of the queries; 0 for uncompressed queries.
    qk_nope_head_dim: width of the part of a query or key head without positions.
    qk_rope_head_dim: width of the rotary part; all heads share its key.
    v_head_dim: width of a value head.
    rope: rotary positions, or none: the rotary part is then a shared part of the keys that is not rotated, as in Kimi
        Linear (arXiv 2510.26692), whose other layers see the order of tokens.
    gate: of each head's output, before the output projection: none; or head, the sigmoid of one number for each head,
        a projection of the mixer's input, as in Ling 3.0.
    norm_eps: added to the mean square by the latents' norms.
    backend: auto, reference, torch, tiles, sdpa, or on CUDA flex, flash or cudnn.
    """

    kind: ClassVar[str] = "mla"
    sign: ClassVar[str] = "M"
    ranks: ClassVar[tuple[str, ...]] = ("kv_lora_rank", "q_lora_rank")
    style: ClassVar[str] = "black on magenta"
    n_heads: int
    kv_lora_rank: int = 256
    q_lora_rank: int = 0
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope: RopeConfig | None = field(default_factory=RopeConfig)
    gate: Literal["none", "head"] = "none"
    norm_eps: float = 1e-6
    backend: str = "auto"

    @classmethod
    def example(cls) -> Self:
        """Two heads and a latent of 32, for a model of width 64."""
        return cls(n_heads=2, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32)

    @classmethod
    def fitting(cls, width: int, n_heads: int) -> dict[str, Any]:
        """Heads that together are as wide as the model and a latent of half its width; no more than the defaults."""
        head = width // n_heads
        rope = max(2, min(cls.qk_rope_head_dim, head // 4 * 2))
        return {
            "kv_lora_rank": max(1, min(cls.kv_lora_rank, width // 2)),
            "qk_nope_head_dim": max(1, min(cls.qk_nope_head_dim, head - rope)),
            "qk_rope_head_dim": rope,
            "v_head_dim": max(1, min(cls.v_head_dim, head)),
        }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be > 0")
        require(self.q_lora_rank >= 0, "q_lora_rank", self.q_lora_rank, "must be >= 0 (0: queries not compressed)")
        rope_dim, wanted = self.qk_rope_head_dim, "must be > 0" if self.rope is None else "must be even and > 0"
        fits = rope_dim > 0 and (rope_dim % 2 == 0 or self.rope is None)
        require(fits, "qk_rope_head_dim", rope_dim, f"{wanted}, e.g. 64")
        require(self.gate in ("none", "head"), "gate", self.gate, "must be one of none, head")
        require(self.norm_eps > 0, "norm_eps", self.norm_eps, "must be > 0, e.g. 1e-6")

    @property
    def qk_head_dim(self) -> int:
        """Width of a query and key head: the part without positions and the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def build(self, width: int) -> "MLA":
        """The module."""
        return MLA(self, width)

    def heads(self, width: int) -> Heads:
        """The heads, independent of the model's width."""
        return Heads(self.n_heads, self.qk_head_dim, self.v_head_dim)

    def projection_weights(self, width: int) -> int:
        """Parameters of the projection matrices."""
        q_dim = self.n_heads * self.qk_head_dim
        queries = self.q_lora_rank * (width + q_dim) if self.q_lora_rank else width * q_dim
        latent = width * (self.kv_lora_rank + self.qk_rope_head_dim)
        expansion = self.kv_lora_rank * self.n_heads * (self.qk_nope_head_dim + self.v_head_dim)
        gate = self.n_heads * width if self.gate == "head" else 0
        return queries + latent + expansion + gate + self.n_heads * self.v_head_dim * width

    def n_parameters(self, width: int) -> int:
        """Parameters of the module; ConfigError where a rank is larger than the width it compresses."""
        allowed = f"a rank larger than the width {width} compresses nothing"
        require(self.kv_lora_rank <= width, "kv_lora_rank", self.kv_lora_rank, allowed)
        require(self.q_lora_rank <= width, "q_lora_rank", self.q_lora_rank, allowed)
        return self.projection_weights(width) + self.q_lora_rank + self.kv_lora_rank

    def state_settings(self, width: int) -> dict[str, int]:
        """The width of the latent."""
        return {"kv_lora_rank": self.kv_lora_rank}

    def state_bytes(self, width: int, length: int, element_bytes: int) -> int:
        """Bytes of the state of one sequence that may grow to `length` tokens: latent and rotary key only."""
        return length * (self.kv_lora_rank + self.qk_rope_head_dim) * element_bytes


@dataclass
class MLAState(State):
    """Each token's normalised latent and rotated key, concatenated: (B, max_len, R + rope)."""

    latent_BSR: Tensor


class MLA(SoftmaxMixer[MLAState]):
    """Attention whose keys and values are expanded from a latent of width `kv_lora_rank`.

    `forward` expands keys and values. `step` absorbs the expansion into queries and outputs and attends to the cached
    latents directly. Both are the same function.
    """

    config: MLAConfig

    def __init__(self, config: MLAConfig, width: int) -> None:
        super().__init__(config, width)
        queries = config.n_heads * config.qk_head_dim
        if config.q_lora_rank:
            self.q_a_proj = nn.Linear(width, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.norm_eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, queries, bias=False)
        else:
            self.q_proj = nn.Linear(width, queries, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(width, config.kv_lora_rank + config.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.norm_eps)
        expanded = config.n_heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, expanded, bias=False)
        if config.gate == "head":
            self.g_proj = nn.Linear(width, config.n_heads, bias=False)
        self.o_proj = nn.Linear(config.n_heads * config.v_head_dim, width, bias=False)
        self.min_to_expand = min_tokens_to_expand(config.kv_lora_rank, config.qk_nope_head_dim + config.v_head_dim)

    def project(self, x_BTD: Tensor, seq: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q_nope (B, T, H, nope), q_rope (B, T, H, rope), latent (B, T, R), k_rope (B, T, 1, rope)."""
        widths = (self.config.qk_nope_head_dim, self.config.qk_rope_head_dim)
        q_nope, q_rope = self._unrotated(x_BTD).split(widths, dim=-1)
        return q_nope, self._rotated(q_rope, seq), *self.compress(x_BTD, seq)

    def queries(self, x_BTD: Tensor, seq: Layout) -> Tensor:
        """(B, T, H, nope + rope), the rotary part rotated."""
        return self._rotated(self._unrotated(x_BTD), seq)

    def _rotated(self, x_BTHK: Tensor, seq: Layout) -> Tensor:
        """x with the rotary part of its heads, their last elements, rotated if the config has rope."""
        rope = self.config.rope
        return x_BTHK if rope is None else rope.rotate(x_BTHK, seq, self.config.qk_rope_head_dim)

    def _unrotated(self, x_BTD: Tensor) -> Tensor:
        config = self.config
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD))) if config.q_lora_rank else self.q_proj(x_BTD)
        return q.unflatten(-1, (config.n_heads, -1))

    def compress(self, x_BTD: Tensor, seq: Layout) -> tuple[Tensor, Tensor]:
        """The normalised latent (B, T, R), and the rotated key (B, T, 1, rope) that all heads share."""
        config = self.config
        latent, k_rope = self.kv_a_proj_with_mqa(x_BTD).split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        return self.kv_a_layernorm(latent), self._rotated(k_rope.unsqueeze(2), seq)

    def expand(self, latent_BTR: Tensor, k_rope_BT1K: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (B, T, H, nope + rope) and values (B, T, H, V) of every head."""
        config = self.config
        kv = self.kv_b_proj(latent_BTR).unflatten(-1, (config.n_heads, -1))
        k_nope, v = kv.split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)
        return torch.cat((k_nope, k_rope_BT1K.expand(-1, -1, config.n_heads, -1).to(k_nope.dtype)), dim=-1), v

    def output(self, o_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        """The output projection of the heads' outputs, gated by σ(W x) if the config has a gate."""
        if self.config.gate == "head":
            o_BTHV = o_BTHV * self.g_proj(x_BTD).sigmoid().unsqueeze(-1)
        return self.o_proj(o_BTHV.flatten(2))

    def forward(self, x_BTD: Tensor, seq: Layout) -> Tensor:
        q = self.queries(x_BTD, seq)
        k, v = self.expand(*self.compress(x_BTD, seq))
        return self.output(causal_attention(q, k, v, seq, scale=self.scale, backend=self.config.backend), x_BTD)

    def explain(self, x_BTD: Tensor, seq: Layout) -> Explanation:
        x_BTD = without_padding(x_BTD, seq)
        k, v = self.expand(*self.compress(x_BTD, seq))
        return Explanation(
            weights=softmax_weights(self.queries(x_BTD, seq), k, allowed_mask(seq), scale=self.scale),
            value_BSHV=v,
            gain_BTHV=self.g_proj(x_BTD).sigmoid()[..., None].expand_as(v) if self.config.gate == "head" else None,
            out_HVD=by_head(matrix_of(self.o_proj), self.config.n_heads),
            bias_D=None,
        )

    def init_state(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str) -> MLAState:
        per_token = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        return MLAState(torch.zeros(batch, max_len, per_token, dtype=dtype, device=device))

    def step(self, x_BTD: Tensor, state: MLAState, seq: Layout) -> Tensor:
        config = self.config
        x_BTD = without_padding(x_BTD, seq)
        q_nope, q_rope, latent, k_rope = self.project(x_BTD, seq)
        append(state.latent_BSR, torch.cat((latent, k_rope.squeeze(2).to(latent.dtype)), dim=-1), seq)
        if seq.past is not None and x_BTD.shape[1] >= self.min_to_expand:
            cached = state.latent_BSR[:, : seq.end].to(q_nope.dtype)
            k, v = self.expand(cached[..., : config.kv_lora_rank], cached[..., None, config.kv_lora_rank :])
            q = torch.cat((q_nope, q_rope), dim=-1)
            o = cached_causal_attention(q, k, v, seq, scale=self.scale, backend=config.backend)
            return self.output(o, x_BTD)
        # W_kb and W_vb, (H, nope, R) and (H, V, R): scores = (W_kbᵀ q) · c and outputs = W_vb (Σ p c).
        w_HXR = matrix_of(self.kv_b_proj).unflatten(0, (config.n_heads, -1)).to(q_nope.dtype)
        w_kb, w_vb = w_HXR.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
        q = torch.cat((absorb(q_nope, w_kb), q_rope), dim=-1)
        o = attend_to_latents(q, state.latent_BSR, seq.end, causal_mask(seq), scale=self.scale)
        return self.output(absorb(o[..., : config.kv_lora_rank], w_vb.mT), x_BTD)
