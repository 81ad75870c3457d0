"""What the configs of all mixers that weigh values by a softmax share: backends, races between them, and counts."""

from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Self

import torch

from swamla.errors import require
from swamla.model.mixers.mixer import MixerConfig
from swamla.ops.attention import BACKENDS, describe_backend, kept_causal_keys, prepare_attention
from swamla.ops.attention.trial import AttentionTrial
from swamla.ops.layout import Layout


class Heads(NamedTuple):
    """What a softmax attention computes with: heads of keys, and the width of a key and of a value head."""

    key_heads: int
    key: int
    value: int


class SoftmaxConfig(MixerConfig):
    """Causal softmax attention. No dataclass itself, so that each mixer's fields keep an order of their own."""

    BACKENDS: ClassVar[tuple[str, ...]] = BACKENDS
    n_heads: int
    backend: str

    def __post_init__(self) -> None:
        require(self.n_heads > 0, "n_heads", self.n_heads, "must be > 0")
        require(self.backend in self.BACKENDS, "backend", self.backend, f"must be one of {', '.join(self.BACKENDS)}")

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
        """Weights of the matrices that every token is multiplied by."""

    def pairs(self, length: int) -> int:
        """Pairs of a query and a key that it sees, in a document of `length` tokens."""
        return length * (length + 1) // 2

    def forward_flops(self, width: int, length: int) -> int:
        """Floating-point operations of one forward pass over one document of `length` tokens: seen pairs alone."""
        _, key, value = self.heads(width)
        return 2 * self.projection_weights(width) * length + 2 * self.n_heads * (key + value) * self.pairs(length)

    def backends(self, device: torch.device, width: int, dtype: torch.dtype) -> dict[str, str]:
        """What computes which op on `device`. Raises `MissingBackendError` for a backend that cannot."""
        return {"attention": describe_backend(self.backend, device, dtype)}

    def with_backend(self, backend: str) -> Self:
        """The same mixer computed by `backend`, where the config leaves the choice open ("auto")."""
        chosen: dict[str, Any] = {"backend": backend}
        return replace(self, **chosen) if self.backend == "auto" else self

    def trial(self, width: int) -> AttentionTrial | None:
        """What to race where the backend is left to "auto"."""
        if self.backend != "auto":
            return None
        key_heads, key, value = self.heads(width)
        return AttentionTrial(heads=self.n_heads, key_heads=key_heads, key=key, value=value)

    def prepare(self, seq: Layout, width: int) -> None:
        """Make masks and tables eagerly, so that the compiled forward has no graph break."""
        prepare_attention(seq, self.backend)

    def kept_weights(self, width: int, length: int, *, bf16: bool) -> float:
        """Attention weights that a token of a document keeps for the backward pass on a CPU, of all heads."""
        _, key, value = self.heads(width)
        kept = kept_causal_keys(length, bf16=bf16, key_width=key, value_width=value, backend=self.backend)
        return self.n_heads * kept
