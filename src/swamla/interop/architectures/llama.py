"""Llama and those that differ from it in a detail: Mistral, Ministral, Qwen2, Qwen3."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch

from swamla.errors import require
from swamla.interop.architecture import Architecture, Lacks, RopeParameters, ffn_of, mixer_of, norm_of
from swamla.interop.weights import Rule, constant, rows, same
from swamla.model.block import BlockConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.mixers.mixer import MixerConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.model.norm import RMSNormConfig
from swamla.registry import register

LayerType = Literal["full_attention", "sliding_attention"]


@dataclass(frozen=True, kw_only=True)
class LlamaLike(Architecture):
    """What Llama and its relatives share: `mha` or `swa` with rotary positions, SwiGLU, RMSNorm before both."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: Literal["silu"] = "silu"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    rope_parameters: RopeParameters = field(default_factory=RopeParameters)
    qkv_bias: ClassVar[bool] = False
    o_bias: ClassVar[bool] = False

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
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            require(self.__dict__[name] > 0, name, self.__dict__[name], "must be > 0")

    @property
    def layer_kinds(self) -> tuple[str, ...]:
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

    def attention(self) -> dict[str, Any]:
        """The settings that mixers of both kinds share."""
        return {
            "n_heads": self.num_attention_heads,
            "n_kv_heads": None if self.kv_heads == self.num_attention_heads else self.kv_heads,
            "head_dim": None if self.head_width * self.num_attention_heads == self.hidden_size else self.head_width,
            "rope": self.rope_parameters.rope("half"),
            "bias": self.qkv_bias,
        }

    def ffn(self) -> DenseConfig:
        """The FFN of every layer."""
        return DenseConfig(hidden=self.intermediate_size)

    def mixers(self) -> dict[str, tuple[str, Callable[[], MixerConfig]]]:
        """Kind of layer → name of the block, and its mixer."""
        return {
            "full_attention": ("mha", lambda: MHAConfig(**self.attention())),
            "sliding_attention": ("swa", lambda: SWAConfig(**self.attention(), window=self.window, sinks=0)),
        }

    def block(self, kind: str, mixer: MixerConfig) -> BlockConfig:
        """The block of a kind of layer."""
        return BlockConfig(mixer=mixer, ffn=self.ffn())

    def language_model(self) -> LanguageModelConfig:
        """The equal model of ours."""
        mixers = self.mixers()
        used = {kind: mixers[kind] for kind in dict.fromkeys(self.layer_kinds)}
        return LanguageModelConfig(
            vocab_size=self.vocab_size,
            width=self.hidden_size,
            blocks={name: self.block(kind, make()) for kind, (name, make) in used.items()},
            pattern=tuple(used[kind][0] for kind in self.layer_kinds),
            norm=RMSNormConfig(eps=self.rms_norm_eps),
            tied_head=self.tie_word_embeddings,
        )

    @classmethod
    def of(cls, config: LanguageModelConfig) -> Self:
        """The one that has the settings of a model of ours, as far as it has them."""
        mixer, ffn = config.layers[0].mixer, ffn_of(cls.kind, config, DenseConfig)
        if not isinstance(mixer, MHAConfig):
            raise Lacks(cls.kind, f"blocks.{config.pattern[0]}.mixer.kind", mixer.kind, "mha or swa")
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=ffn.hidden_dim(config.width),
            num_hidden_layers=config.depth,
            num_attention_heads=mixer.n_heads,
            num_key_value_heads=mixer.kv_heads,
            head_dim=mixer.key_dim(config.width),
            rms_norm_eps=norm_of(cls.kind, config, RMSNormConfig).eps,
            tie_word_embeddings=config.tied_head,
            rope_parameters=RopeParameters() if mixer.rope is None else RopeParameters.of(mixer.rope),
            **cls.details(config),
        )

    @classmethod
    def details(cls, config: LanguageModelConfig) -> dict[str, Any]:
        """The fields that only this architecture has."""
        return {}

    def rules(self) -> Iterator[Rule]:
        """How our weights are made of theirs."""
        yield same("embedding.weight", "model.embed_tokens.weight")
        yield self.gain("norm.weight", "model.norm.weight")
        if not self.tie_word_embeddings:
            yield same("head.weight", "lm_head.weight")
        for index, kind in enumerate(self.layer_kinds):
            ours, theirs = f"blocks.{index}", f"model.layers.{index}"
            for norm, their_norm in zip(("mixer_norm", "ffn_norm"), self.norms(kind), strict=True):
                yield self.gain(f"{ours}.{norm}.weight", f"{theirs}.{their_norm}.weight")
            yield from self.mixer_rules(kind, f"{ours}.mixer", theirs)
            yield from self.ffn_rules(f"{ours}.ffn", f"{theirs}.mlp")

    gain = staticmethod(same)  # the rule of a norm's gain

    def norms(self, kind: str) -> tuple[str, str]:
        """Their names of the norms of mixer and FFN in a layer of that kind."""
        return "input_layernorm", "post_attention_layernorm"

    def mixer_rules(self, kind: str, ours: str, theirs: str) -> Iterator[Rule]:
        """The weights of the mixer of a layer of that kind, whose names begin with `theirs`."""
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

    def ffn_rules(self, ours: str, theirs: str, bias: bool = False) -> Iterator[Rule]:
        """The weights of one FFN."""
        for kind in ("weight", "bias") if bias else ("weight",):
            named = {f"{theirs}.{x}_proj.{kind}": self.intermediate_size for x in ("gate", "up")}
            yield rows(f"{ours}.gate_up_proj.{kind}", named)
            yield same(f"{ours}.down_proj.{kind}", f"{theirs}.down_proj.{kind}")


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

    def ffn(self) -> DenseConfig:
        """SwiGLU, perhaps with biases."""
        return DenseConfig(hidden=self.intermediate_size, bias=self.mlp_bias)

    def ffn_rules(self, ours: str, theirs: str, bias: bool = False) -> Iterator[Rule]:
        """The weights of one FFN."""
        return super().ffn_rules(ours, theirs, self.mlp_bias)

    @classmethod
    def details(cls, config: LanguageModelConfig) -> dict[str, Any]:
        """Biases."""
        mixer, ffn = mixer_of(cls.kind, config, MHAConfig), ffn_of(cls.kind, config, DenseConfig)
        return {"attention_bias": mixer.bias, "mlp_bias": ffn.bias}


@register
@dataclass(frozen=True, kw_only=True)
class Mistral(LlamaLike):
    """Mistral (arXiv 2310.06825): every layer sees the same window, or all tokens."""

    kind: ClassVar[str] = "mistral"
    class_name: ClassVar[str] = "MistralForCausalLM"
    sliding_window: int | None = 4096

    @property
    def layer_kinds(self) -> tuple[str, ...]:
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
        return {"sliding_window": mixer.window if isinstance(mixer, SWAConfig) else None}


@register
@dataclass(frozen=True, kw_only=True)
class Ministral(LlamaLike):
    """Ministral: layers that see a window and layers that see all tokens, in any order."""

    kind: ClassVar[str] = "ministral"
    class_name: ClassVar[str] = "MinistralForCausalLM"
    sliding_window: int | None = 4096
    layer_types: tuple[LayerType, ...] = ()

    @property
    def layer_kinds(self) -> tuple[str, ...]:
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
        local = [isinstance(block.mixer, SWAConfig) for block in config.layers]
        window = mixer_of(cls.kind, config, SWAConfig).window if any(local) else None
        return {
            "sliding_window": window,
            "layer_types": tuple("sliding_attention" if each else "full_attention" for each in local),
        }


@register
@dataclass(frozen=True, kw_only=True)
class Qwen2(LlamaLike):
    """Qwen2 (arXiv 2407.10671): biases on queries, keys and values alone. In only: ours are on the output too."""

    kind: ClassVar[str] = "qwen2"
    class_name: ClassVar[str] = "Qwen2ForCausalLM"
    qkv_bias: ClassVar[bool] = True
    fixed: ClassVar[Mapping[str, Any]] = {"use_sliding_window": False}
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
