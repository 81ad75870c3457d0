"""The base of the mixers of softmax attention: backends, the choice between them, the scores' scale, and counts."""

import math
from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from swamla.errors import require
from swamla.model.mixers.explanation import Weights
from swamla.model.mixers.mixer import Mixer, MixerConfig, S
from swamla.model.rope import RopeConfig
from swamla.ops.attention import BACKENDS, describe_backend, kept_causal_keys, prepare_attention
from swamla.ops.attention.reference import attention_weights
from swamla.ops.attention.trial import AttentionTrial
from swamla.ops.layout import Layout


class Heads(NamedTuple):
    """Number of key heads, and the width of a key head and of a value head."""

    key_heads: int
    key: int
    value: int


class SoftmaxConfig(MixerConfig):
    """Causal softmax attention. Not a dataclass, so that each mixer orders its own fields.

    rope: rotary positions, or none.
    softmax_scale: factor of the scores before the softmax; by default one over the root of a key head's width.
    sink_logit: whether each head has a learned score of a token with a value of zeros.
    """

    only_projects: ClassVar[bool] = True
    BACKENDS: ClassVar[tuple[str, ...]] = BACKENDS
    n_heads: int
    rope: RopeConfig | None = None
    softmax_scale: float | None = None
    sink_logit: bool = False
    backend: str

    def __post_init__(self) -> None:
        require(self.n_heads > 0, "n_heads", self.n_heads, "must be > 0")
        require(self.backend in self.BACKENDS, "backend", self.backend, f"must be one of {', '.join(self.BACKENDS)}")
        scale = self.softmax_scale
        fits = scale is None or 0 < scale < math.inf
        require(fits, "softmax_scale", scale, "must be > 0, e.g. 0.125, or none: one over the root of the key width")

    @classmethod
    def example(cls) -> Self:
        """Two heads, for a model of width 64."""
        settings: dict[str, Any] = {"n_heads": 2}
        return cls(**settings)

    @abstractmethod
    def heads(self, width: int) -> Heads:
        """The heads in a model of `width`. Raises `ConfigError` where they do not fit it."""

    @abstractmethod
    def projection_weights(self, width: int) -> int:
        """Parameters of the projection matrices."""

    @property
    def sees_order(self) -> bool:
        """True with rotary positions."""
        return self.rope is not None

    def scale(self, width: int, base_width: int | None = None) -> float:
        """Factor of the scores before the softmax in a model of `width`, YaRN's included.

        base_width: µP's. There the factor is the same; elsewhere it falls as one over the width of the key heads.
        """
        base = self.heads(base_width or width).key
        plain = base**-0.5 if self.softmax_scale is None else self.softmax_scale
        return plain * base / self.heads(width).key * (self.rope.softmax_factor if self.rope else 1.0)

    @property
    def explained_heads(self) -> int:
        """Heads of the mixer's explanation."""
        return self.n_heads

    def pairs(self, length: int) -> int:
        """Pairs of query and key that the mask allows in a document of `length` tokens."""
        return length * (length + 1) // 2

    def forward_flops(self, width: int, length: int) -> int:
        """Floating-point operations of one forward pass over one document of `length` tokens, without masked pairs."""
        _, key, value = self.heads(width)
        return 2 * self.projection_weights(width) * length + 2 * self.n_heads * (key + value) * self.pairs(length)

    def backends(self, device: torch.device, width: int, dtype: torch.dtype) -> dict[str, str]:
        """Op → backend. Raises `MissingBackendError` for a backend that cannot compute on `device`."""
        _, key, value = self.heads(width)
        return {
            "attention": describe_backend(self.backend, device, dtype, key=key, value=value, sink_logit=self.sink_logit)
        }

    def trial(self, width: int) -> AttentionTrial | None:
        """The attention whose backends are timed when the backend is "auto"."""
        if self.backend != "auto":
            return None
        key_heads, key, value = self.heads(width)
        return AttentionTrial(heads=self.n_heads, key_heads=key_heads, key=key, value=value, sink_logit=self.sink_logit)

    def prepare(self, seq: Layout, width: int) -> None:
        """Build masks and tables eagerly, so that the compiled forward has no graph break."""
        _, key, value = self.heads(width)
        prepare_attention(seq, self.backend, key=key, value=value, sink_logit=self.sink_logit)

    def kept_weights(self, width: int, length: int, *, bf16: bool) -> float:
        """Attention weights per token, over all heads, that are saved for the backward pass on a CPU."""
        _, key, value = self.heads(width)
        kept = kept_causal_keys(
            length, bf16=bf16, key_width=key, value_width=value, backend=self.backend, sink_logit=self.sink_logit
        )
        return self.n_heads * kept


class SoftmaxMixer(Mixer[S]):
    """Softmax attention. scale: factor of the scores before the softmax."""

    config: SoftmaxConfig

    def __init__(self, config: SoftmaxConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.width = width
        self.scale = config.scale(width)

    def scale_from(self, base_width: int) -> None:
        self.scale = self.config.scale(self.width, base_width)


def softmax_weights(
    q_BTHK: Tensor, k_BSGK: Tensor, allowed_BTS: Tensor, *, scale: float, sink_logit_H: Tensor | None = None
) -> Weights:
    """`attention_weights` of all query heads, or of some of them: each has its key head to itself."""
    batch, time, heads = q_BTHK.shape[:3]
    k_BSHK = k_BSGK.repeat_interleave(heads // k_BSGK.shape[2], dim=2)

    def of(part: slice) -> Tensor:
        sink_logit = None if sink_logit_H is None else sink_logit_H[part]
        return attention_weights(
            q_BTHK[:, :, part], k_BSHK[:, :, part], allowed_BTS, scale=scale, sink_logit_H=sink_logit
        )

    return Weights(of, (batch, heads, time, k_BSHK.shape[1]))
