"""Multi-head (arXiv 1706.03762) and grouped-query attention (arXiv 2305.13245) over all earlier tokens."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from swamla.errors import require
from swamla.model.initial import Initializer, constant
from swamla.model.mixers.explanation import Explanation, by_head
from swamla.model.mixers.mixer import State, append, cached_causal_attention, without_padding
from swamla.model.mixers.softmax import Heads, SoftmaxConfig, SoftmaxMixer, softmax_weights
from swamla.model.norm import RMSNorm
from swamla.model.rope import RopeConfig
from swamla.ops.attention import causal_attention
from swamla.ops.attention.reference import CAUSAL, Window, allowed_mask
from swamla.ops.layout import Layout
from swamla.ops.linear import matrix_of
from swamla.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class MHAConfig(SoftmaxConfig):
    """Multi-head attention.

    n_heads: query heads.
    n_kv_heads: heads of keys and values, each shared by a group of query heads; as many as n_heads by default.
    head_dim: width of a head, width / n_heads by default.
    rope: rotary positions, or none (the model may have learned ones).
    rope_dim: how many elements of a head are rotated, its last ones as in `mla`; all by default. GPT-NeoX and
        Qwen3-Next rotate the first ones: the same function once each head's rows of queries and keys are permuted.
    bias: whether projections have one, as in GPT-2.
    gate: of each element of the heads' outputs, before the output projection, by a projection of the mixer's input:
        none, or sigmoid (arXiv 2505.06708, G1; as in Qwen3-Next).
    qk_norm: RMSNorm of queries and keys before rotation: none, head (each by itself, as in Qwen3, arXiv 2505.09388) or
        whole (all heads together, as in OLMo 2, arXiv 2501.00656).
    norm_eps: added to the mean square by these norms.
    softmax_scale: factor of the scores before the softmax, one over the root of head_dim by default; YaRN's factor
        comes on top. Granite's attention_multiplier.
    sink_logit: whether each head has a learned logit in the softmax's denominator, as if one more token with a value of
        zeros had this score (arXiv 2508.10925, gpt-oss). In `swa` it takes the place of kept tokens: needs sinks = 0.
    backend: auto, reference, torch, tiles, sdpa, or on CUDA flex, flash or cudnn.
    """

    kind: ClassVar[str] = "mha"
    sign: ClassVar[str] = "A"
    style: ClassVar[str] = "black on yellow"
    head_counts: ClassVar[tuple[str, ...]] = ("n_heads", "n_kv_heads")
    n_heads: int
    n_kv_heads: int | None = None
    head_dim: int | None = None
    rope: RopeConfig | None = field(default_factory=RopeConfig)
    rope_dim: int | None = None
    bias: bool = False
    gate: Literal["none", "sigmoid"] = "none"
    qk_norm: Literal["none", "head", "whole"] = "none"
    norm_eps: float = 1e-6
    softmax_scale: float | None = None
    sink_logit: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.kv_heads > 0 and self.n_heads % self.kv_heads == 0,
            "n_kv_heads",
            self.n_kv_heads,
            f"must divide n_heads = {self.n_heads}",
        )
        require(self.head_dim is None or self.head_dim > 0, "head_dim", self.head_dim, "must be > 0, e.g. 64")
        odd = self.turns_whole_heads and self.head_dim is not None and self.head_dim % 2 == 1
        require(not odd, "head_dim", self.head_dim, "must be even with rotary positions, e.g. 64")
        if self.rope_dim is not None:
            even = self.rope_dim > 0 and self.rope_dim % 2 == 0
            require(even, "rope_dim", self.rope_dim, "must be even and > 0, e.g. 32, or none: the whole head")
            require(self.rope is not None, "rope_dim", self.rope_dim, "must be none without rotary positions")
            self._require_rope_fits(self.head_dim)
        require(self.norm_eps > 0, "norm_eps", self.norm_eps, "must be > 0, e.g. 1e-6")

    def _require_rope_fits(self, key_dim: int | None) -> None:
        fits = self.rope_dim is None or key_dim is None or self.rope_dim <= key_dim
        require(fits, "rope_dim", self.rope_dim, f"must be at most the width of a head, {key_dim}")

    @property
    def turns_whole_heads(self) -> bool:
        """Whether every element of a head is rotated."""
        return self.rope is not None and self.rope_dim is None

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    def key_dim(self, width: int) -> int:
        """Width of a head in a model of `width`; ConfigError where the heads do not divide it."""
        if self.head_dim is not None:
            return self.head_dim
        require(width % self.n_heads == 0, "n_heads", self.n_heads, f"must divide the width {width}, or give head_dim")
        even = not self.turns_whole_heads or width // self.n_heads % 2 == 0
        require(even, "n_heads", self.n_heads, f"gives heads of odd width {width // self.n_heads}, rope needs even")
        self._require_rope_fits(width // self.n_heads)
        return width // self.n_heads

    def build(self, width: int) -> "MHA":
        """The module."""
        return MHA(self, width)

    def heads(self, width: int) -> Heads:
        """The heads in a model of `width`. Raises `ConfigError` where they do not fit it."""
        key_dim = self.key_dim(width)
        return Heads(self.kv_heads, key_dim, key_dim)

    def norm_gains(self, width: int) -> int:
        """Parameters of the norms of queries and keys."""
        heads = {"none": 0, "head": 2, "whole": self.n_heads + self.kv_heads}[self.qk_norm]
        return heads * self.key_dim(width)

    @property
    def gate_heads(self) -> int:
        """Heads of the gate."""
        return 0 if self.gate == "none" else self.n_heads

    @property
    def projected_heads(self) -> tuple[int, int, int, int]:
        """Heads of queries, keys, values and the gate, in the order of the rows of `qkv_proj`."""
        return self.n_heads, self.kv_heads, self.kv_heads, self.gate_heads

    def projections(self, width: int) -> dict[str, dict[str, int]]:
        """Queries, keys, values and the gate."""
        names, key = ("q", "k", "v", "gate"), self.key_dim(width)
        heads = dict(zip(names, self.projected_heads, strict=True))
        return {"qkv_proj.weight": {name: count * key for name, count in heads.items()}}

    def projection_weights(self, width: int) -> int:
        """Parameters of the projection matrices."""
        return width * (2 * self.n_heads + 2 * self.kv_heads + self.gate_heads) * self.key_dim(width)

    def n_parameters(self, width: int) -> int:
        """Parameters of the module."""
        biases = (self.n_heads + 2 * self.kv_heads + self.gate_heads) * self.key_dim(width) + width
        return (
            self.projection_weights(width)
            + self.bias * biases
            + self.norm_gains(width)
            + self.sink_logit * self.n_heads
        )

    def state_bytes(self, width: int, length: int, element_bytes: int) -> int:
        """Bytes of the state of one sequence that may grow to `length` tokens."""
        return 2 * length * self.kv_heads * self.key_dim(width) * element_bytes


@dataclass
class KVState(State):
    """Rotated keys, and values, (B, S, G, K): of all tokens; for windowed attention, of the sinks and a ring buffer."""

    k_BSGK: Tensor
    v_BSGK: Tensor


class MHA(SoftmaxMixer[KVState]):
    """softmax(q kᵀ / √K) v over all earlier tokens of the document, gated by σ(W x) if the config has a gate.

    sink_logit: (H,) or None.
    """

    config: MHAConfig

    def __init__(self, config: MHAConfig, width: int) -> None:
        super().__init__(config, width)
        self.key_dim = config.key_dim(width)
        self.rope_dim = self.key_dim if config.rope_dim is None else config.rope_dim
        self.qkv_proj = nn.Linear(width, sum(config.projected_heads) * self.key_dim, bias=config.bias)
        self.o_proj = nn.Linear(config.n_heads * self.key_dim, width, bias=config.bias)
        if config.qk_norm != "none":
            q_heads, k_heads = (1, 1) if config.qk_norm == "head" else (config.n_heads, config.kv_heads)
            self.q_norm = RMSNorm(q_heads * self.key_dim, config.norm_eps)
            self.k_norm = RMSNorm(k_heads * self.key_dim, config.norm_eps)
        self.sink_logit = nn.Parameter(torch.zeros(config.n_heads)) if config.sink_logit else None

    def initializers(self) -> dict[str, Initializer]:
        """A sink logit is 0 at first: the score of a key that is orthogonal to the query."""
        return {} if self.sink_logit is None else {"sink_logit": constant(0.0)}

    def project(self, x_BTD: Tensor, seq: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries (B, T, H, K), keys and values (B, T, G, K), and the gate before its sigmoid, (B, T, H, K) or empty.

        Queries and keys are rotated if the config has rope.
        """
        config = self.config
        heads = self.qkv_proj(x_BTD).unflatten(-1, (-1, self.key_dim))
        if config.qk_norm != "none" or config.rope is None:
            q, k, v, gate = heads.split(config.projected_heads, dim=2)
            if config.qk_norm != "none":
                q, k = self._normed(q, self.q_norm), self._normed(k, self.k_norm)
            if config.rope is not None:
                q, k = (config.rope.rotate(x, seq, self.rope_dim) for x in (q, k))
            return q, k, v, gate
        qk, v, gate = heads.split((config.n_heads + config.kv_heads, config.kv_heads, config.gate_heads), dim=2)
        q, k = config.rope.rotate(qk, seq, self.rope_dim).split((config.n_heads, config.kv_heads), dim=2)
        return q, k, v, gate

    def _normed(self, x_BTHK: Tensor, norm: RMSNorm) -> Tensor:
        """Normalised by head, or all heads together if the norm is that wide."""
        return norm(x_BTHK) if self.config.qk_norm == "head" else norm(x_BTHK.flatten(2)).view(x_BTHK.shape)

    @property
    def softmax(self) -> dict[str, Any]:
        """Arguments of every attention op."""
        return {"scale": self.scale, "sink_logit_H": self.sink_logit}

    def output(self, o_BTHK: Tensor, gate_BTHK: Tensor) -> Tensor:
        """The output projection of the heads' gated outputs."""
        if self.config.gate == "sigmoid":
            o_BTHK = o_BTHK * gate_BTHK.sigmoid()
        return self.o_proj(o_BTHK.flatten(2))

    def forward(self, x_BTD: Tensor, seq: Layout) -> Tensor:
        q, k, v, gate = self.project(x_BTD, seq)
        return self.output(causal_attention(q, k, v, seq, **self.softmax, backend=self.config.backend), gate)

    @property
    def window(self) -> Window:
        """What a token attends to: all earlier ones of its document."""
        return CAUSAL

    def explain(self, x_BTD: Tensor, seq: Layout) -> Explanation:
        q, k, v, gate = self.project(without_padding(x_BTD, seq), seq)
        return Explanation(
            weights=softmax_weights(q, k, allowed_mask(seq, self.window), **self.softmax),
            value_BSHV=v.repeat_interleave(self.config.n_heads // self.config.kv_heads, dim=2),
            gain_BTHV=gate.sigmoid() if self.config.gate == "sigmoid" else None,
            out_HVD=by_head(matrix_of(self.o_proj), self.config.n_heads),
            bias_D=self.o_proj.bias,
        )

    def init_state(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str) -> KVState:
        shape = (batch, max_len, self.config.kv_heads, self.key_dim)
        k, v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return KVState(k, v)

    def step(self, x_BTD: Tensor, state: KVState, seq: Layout) -> Tensor:
        q, k, v, gate = self.project(without_padding(x_BTD, seq), seq)
        append(state.k_BSGK, k, seq)
        append(state.v_BSGK, v, seq)
        cached_k, cached_v = state.k_BSGK[:, : seq.end].to(q.dtype), state.v_BSGK[:, : seq.end].to(q.dtype)
        o = cached_causal_attention(q, cached_k, cached_v, seq, **self.softmax, backend=self.config.backend)
        return self.output(o, gate)
