"""Llama and those that differ from it in a detail: Mistral, Ministral, Qwen2, Qwen3."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch

from swamla.errors import require
from swamla.interop.equality import Lacks, ffn_of, mixer_of
from swamla.interop.rope import RopeParameters
from swamla.interop.stack import Stack, swiglu_rules
from swamla.interop.weights import Rule, constant, rows, same
from swamla.model.block import BlockConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.ffns.ffn import FFNConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.model.rope import RopeConfig
from swamla.registry import register

LayerType = Literal["full_attention", "sliding_attention"]


@dataclass(frozen=True, kw_only=True)
class LlamaLike(Stack):
    """What Llama and its relatives share: `mha` or `swa` with rotary positions, SwiGLU, RMSNorm before both."""

    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rope_parameters: RopeParameters = field(default_factory=RopeParameters)
    qkv_bias: ClassVar[bool] = False
    o_bias: ClassVar[bool] = False
    without_rope: ClassVar[RopeParameters] = RopeParameters()  # nearest to a model of ours that has no rotary positions

    @classmethod
    def example(cls) -> Self:
        """Two layers with grouped heads."""
        return cls(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_attention_heads > 0, "num_attention_heads", self.num_attention_heads, "must be > 0")

    @property
    def layer_kinds(self) -> Sequence[str]:
        """The kind of every layer."""
        return ("full_attention",) * self.num_hidden_layers

    @property
    def window(self) -> int:
        """Tokens that a layer of sliding attention sees."""
        return 0

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope(self) -> RopeConfig | None:
        """Rotary positions."""
        return self.rope_parameters.rope("half")

    def attention(self) -> dict[str, Any]:
        """The settings that mixers of both kinds share."""
        return {
            "n_heads": self.num_attention_heads,
            "n_kv_heads": None if self.kv_heads == self.num_attention_heads else self.kv_heads,
            "head_dim": None if self.head_width * self.num_attention_heads == self.hidden_size else self.head_width,
            "rope": self.rope,
            "bias": self.qkv_bias,
        }

    def ffn(self) -> FFNConfig:
        """The FFN of every layer."""
        return DenseConfig(hidden=self.intermediate_size)

    def block(self, kind: str) -> tuple[str, BlockConfig]:
        """A layer that sees a window, or all tokens."""
        if kind == "sliding_attention":
            return "swa", BlockConfig(mixer=SWAConfig(**self.attention(), window=self.window, sinks=0), ffn=self.ffn())
        return "mha", BlockConfig(mixer=MHAConfig(**self.attention()), ffn=self.ffn())

    @classmethod
    def of(cls, config: LanguageModelConfig) -> Self:
        """The one that has the settings of a model of ours, as far as it has them."""
        mixer = next((block.mixer for block in config.layers if isinstance(block.mixer, MHAConfig)), None)
        if mixer is None:
            raise Lacks(cls.kind, f"blocks.{config.pattern[0]}.mixer.kind", config.layers[0].mixer.kind, "mha or swa")
        head = mixer.key_dim(config.width)
        rope = cls.without_rope
        if mixer.rope is not None:
            rope = RopeParameters.of(mixer.rope, partial=(mixer.rope_dim or head) / head)
        return cls(
            **cls.size_of(config),
            num_attention_heads=mixer.n_heads,
            num_key_value_heads=mixer.kv_heads,
            head_dim=head,
            rope_parameters=rope,
            **cls.details(config),
        )

    @classmethod
    def details(cls, config: LanguageModelConfig) -> dict[str, Any]:
        """The fields that only this architecture has, and the FFN's."""
        return {"intermediate_size": ffn_of(cls.kind, config, DenseConfig).hidden_dim(config.width)}

    def mixer_rules(self, kind: str, ours: str, theirs: str) -> Iterator[Rule]:
        """The weights of the mixer."""
        theirs = f"{theirs}.self_attn"
        sizes = {"q": self.num_attention_heads, "k": self.kv_heads, "v": self.kv_heads}
        for what in ("weight", "bias") if self.qkv_bias else ("weight",):
            named = {f"{theirs}.{x}_proj.{what}": heads * self.head_width for x, heads in sizes.items()}
            yield rows(f"{ours}.qkv_proj.{what}", named)
        yield same(f"{ours}.o_proj.weight", f"{theirs}.o_proj.weight")
        if self.o_bias:
            yield same(f"{ours}.o_proj.bias", f"{theirs}.o_proj.bias")
        elif self.qkv_bias:
            yield constant(f"{ours}.o_proj.bias", torch.zeros(self.hidden_size))


@register
@dataclass(frozen=True, kw_only=True)
class Llama(LlamaLike):
    """Llama (arXiv 2302.13971): `mha` in every layer, with or without biases."""

    kind: ClassVar[str] = "llama"
    class_name: ClassVar[str] = "LlamaForCausalLM"
    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def qkv_bias(self) -> bool:  # type: ignore[override]
        """As the config says."""
        return self.attention_bias

    @property
    def o_bias(self) -> bool:  # type: ignore[override]
        """The same."""
        return self.attention_bias

    def ffn(self) -> FFNConfig:
        """SwiGLU, perhaps with biases."""
        return DenseConfig(hidden=self.intermediate_size, bias=self.mlp_bias)

    def ffn_rules(self, kind: str, ours: str, theirs: str) -> Iterator[Rule]:
        """SwiGLU, perhaps with biases."""
        return swiglu_rules(ours, f"{theirs}.mlp", self.intermediate_size, bias=self.mlp_bias)

    @classmethod
    def details(cls, config: LanguageModelConfig) -> dict[str, Any]:
        """Biases."""
        mixer, ffn = mixer_of(cls.kind, config, MHAConfig), ffn_of(cls.kind, config, DenseConfig)
        return {**super().details(config), "attention_bias": mixer.bias, "mlp_bias": ffn.bias}


@register
@dataclass(frozen=True, kw_only=True)
class Mistral(LlamaLike):
    """Mistral (arXiv 2310.06825): every layer sees the same window, or all tokens."""

    kind: ClassVar[str] = "mistral"
    class_name: ClassVar[str] = "MistralForCausalLM"
    sliding_window: int | None = 4096

    @property
    def layer_kinds(self) -> Sequence[str]:
        """One kind for all layers."""
        kind = "full_attention" if self.sliding_window is None else "sliding_attention"
        return (kind,) * self.num_hidden_layers

    @property
    def window(self) -> int:
        """Tokens that every layer sees."""
        return self.sliding_window or 0

    @classmethod
    def details(cls, config: LanguageModelConfig) -> dict[str, Any]:
        """The window."""
        mixer = config.layers[0].mixer
        window = mixer.window if isinstance(mixer, SWAConfig) else None
        return {**super().details(config), "sliding_window": window}


@register
@dataclass(frozen=True, kw_only=True)
class Ministral(LlamaLike):
    """Ministral: layers that see a window and layers that see all tokens, in any order."""

    kind: ClassVar[str] = "ministral"
    class_name: ClassVar[str] = "MinistralForCausalLM"
    sliding_window: int | None = 4096
    layer_types: tuple[LayerType, ...] = ()

    @property
    def layer_kinds(self) -> Sequence[str]:
        """As the config says; by default as the window says."""
        kind = "full_attention" if self.sliding_window is None else "sliding_attention"
        return self.layer_types or (kind,) * self.num_hidden_layers

    @property
    def window(self) -> int:
        """Tokens that a layer of sliding attention sees."""
        return self.sliding_window or 0

    @classmethod
    def details(cls, config: LanguageModelConfig) -> dict[str, Any]:
        """The window, and which layers have it."""
        return {**super().details(config), **windows_of(config)}


def windows_of(config: LanguageModelConfig) -> dict[str, Any]:
    """The window of a model of ours, None without one, and which layers have it."""
    windows = [block.mixer.window if isinstance(block.mixer, SWAConfig) else None for block in config.layers]
    return {
        "sliding_window": next((window for window in windows if window), None),
        "layer_types": tuple("sliding_attention" if window else "full_attention" for window in windows),
    }


@register
@dataclass(frozen=True, kw_only=True)
class Qwen2(LlamaLike):
    """Qwen2 (arXiv 2407.10671): biases on queries, keys and values alone. In only: ours are on the output too."""

    kind: ClassVar[str] = "qwen2"
    class_name: ClassVar[str] = "Qwen2ForCausalLM"
    qkv_bias: ClassVar[bool] = True
    fixed: ClassVar[Mapping[str, Any]] = {"use_sliding_window": False}
    harmless: ClassVar[frozenset[str]] = frozenset({"sliding_window"})  # of no layer
    layer_types: tuple[Literal["full_attention"], ...] = ()

    @classmethod
    def of(cls, config: LanguageModelConfig) -> Self:
        """Never: a bias of ours is on the output projection too. Such a model is a Llama."""
        raise Lacks(cls.kind, f"blocks.{config.pattern[0]}.mixer.bias", True, "of queries, keys and values only")


@register
@dataclass(frozen=True, kw_only=True)
class Qwen3(LlamaLike):
    """Qwen3 (arXiv 2505.09388): queries and keys are normalised head by head."""

    kind: ClassVar[str] = "qwen3"
    class_name: ClassVar[str] = "Qwen3ForCausalLM"
    fixed: ClassVar[Mapping[str, Any]] = {"use_sliding_window": False, "attention_bias": False}
    harmless: ClassVar[frozenset[str]] = frozenset({"sliding_window"})  # of no layer
    layer_types: tuple[Literal["full_attention"], ...] = ()
    head_dim: int | None = 128

    def attention(self) -> dict[str, Any]:
        """With norms of queries and keys."""
        return {**super().attention(), "qk_norm": "head", "norm_eps": self.rms_norm_eps}

    def mixer_rules(self, kind: str, ours: str, theirs: str) -> Iterator[Rule]:
        """Those of Llama, and the two gains."""
        yield from super().mixer_rules(kind, ours, theirs)
        for norm in ("q_norm", "k_norm"):
            yield same(f"{ours}.{norm}.weight", f"{theirs}.self_attn.{norm}.weight")
