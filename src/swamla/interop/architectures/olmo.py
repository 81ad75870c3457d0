"""OLMo 2 and OLMo Hybrid: norms behind attention and FFN, queries and keys normalised over all heads together."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from swamla.interop.architecture import mixer_of
from swamla.interop.architectures.llama import LlamaLike
from swamla.interop.stack import delta_rules
from swamla.interop.weights import Rule, rows, same
from swamla.model.block import BlockConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.gdn import GDNConfig
from swamla.registry import register

Kind = Literal["linear_attention", "full_attention"]


@register
@dataclass(frozen=True, kw_only=True)
class Olmo2(LlamaLike):
    """OLMo 2 (arXiv 2501.00656)."""

    kind: ClassVar[str] = "olmo2"
    class_name: ClassVar[str] = "Olmo2ForCausalLM"
    fixed: ClassVar[Mapping[str, Any]] = {"attention_bias": False}
    rms_norm_eps: float = 1e-5

    def attention(self) -> dict[str, Any]:
        """With norms of queries and keys."""
        return {**super().attention(), "qk_norm": "whole", "norm_eps": self.rms_norm_eps}

    def block(self, kind: str) -> tuple[str, BlockConfig]:
        """Norms behind mixer and FFN."""
        name, block = super().block(kind)
        return name, replace(block, norm_place="post")

    def norms(self, kind: str) -> tuple[str, str]:
        """Their names of the norms."""
        return "post_attention_layernorm", "post_feedforward_layernorm"

    def mixer_rules(self, kind: str, ours: str, theirs: str) -> Iterator[Rule]:
        """Those of Llama, and the two gains."""
        yield from super().mixer_rules(kind, ours, theirs)
        for norm in ("q_norm", "k_norm"):
            yield same(f"{ours}.{norm}.weight", f"{theirs}.self_attn.{norm}.weight")


@register
@dataclass(frozen=True, kw_only=True)
class OlmoHybrid(Olmo2):
    """OLMo Hybrid: OLMo 2's attention, and gated DeltaNet with β up to 2 and norms before mixer and FFN."""

    kind: ClassVar[str] = "olmo_hybrid"
    class_name: ClassVar[str] = "OlmoHybridForCausalLM"
    surplus: ClassVar[str] = rf"{LlamaLike.surplus}|mtp\..*"
    renamed: ClassVar[Mapping[str, str]] = {
        r"\.attention_layer_norm\.": ".input_layernorm.",
        r"\.feedforward_layer_norm\.": ".post_attention_layernorm.",
    }
    harmless: ClassVar[frozenset[str]] = frozenset(
        {"linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor"}
    )
    rms_norm_eps: float = 1e-6
    linear_conv_kernel_dim: int = 4
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_allow_neg_eigval: bool = True
    layer_types: tuple[Kind, ...]

    @classmethod
    def example(cls) -> Self:
        """One layer of each kind."""
        return cls(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            linear_key_head_dim=6,
            linear_value_head_dim=12,
            linear_num_key_heads=4,
            linear_num_value_heads=4,
            layer_types=("linear_attention", "full_attention"),
        )

    @property
    def layer_kinds(self) -> Sequence[str]:
        """As the config says."""
        return self.layer_types

    def gdn(self) -> GDNConfig:
        """The mixer of linear attention."""
        return GDNConfig(
            n_heads=self.linear_num_value_heads,
            n_key_heads=self.linear_num_key_heads,
            head_k_dim=self.linear_key_head_dim,
            head_v_dim=self.linear_value_head_dim,
            conv=self.linear_conv_kernel_dim,
            beta_max=2.0 if self.linear_allow_neg_eigval else 1.0,
            norm_eps=1e-5,
        )

    def block(self, kind: str) -> tuple[str, BlockConfig]:
        """Norms behind attention, before linear attention."""
        return (
            ("gdn", BlockConfig(mixer=self.gdn(), ffn=self.ffn()))
            if kind == "linear_attention"
            else super().block(kind)
        )

    def norms(self, kind: str) -> tuple[str, str]:
        """Their names of the norms."""
        return ("input_layernorm", "post_attention_layernorm") if kind == "linear_attention" else super().norms(kind)

    @classmethod
    def details(cls, config: LanguageModelConfig) -> dict[str, Any]:
        """The settings of linear attention, and which layers are it."""
        gdn = mixer_of(cls.kind, config, GDNConfig)
        key, value = gdn.head_dims(config.width)
        local = [isinstance(block.mixer, GDNConfig) for block in config.layers]
        return {
            **super().details(config),
            "linear_conv_kernel_dim": gdn.conv,
            "linear_key_head_dim": key,
            "linear_value_head_dim": value,
            "linear_num_key_heads": gdn.key_heads,
            "linear_num_value_heads": gdn.n_heads,
            "linear_allow_neg_eigval": gdn.beta_max == 2,
            "layer_types": tuple("linear_attention" if each else "full_attention" for each in local),
        }

    def mixer_rules(self, kind: str, ours: str, theirs: str) -> Iterator[Rule]:
        """The weights of one mixer."""
        if kind == "full_attention":
            yield from super().mixer_rules(kind, ours, theirs)
            return
        theirs = f"{theirs}.linear_attn"
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        values = self.linear_num_value_heads * self.linear_value_head_dim
        sizes = {"q": keys, "k": keys, "v": values}
        yield rows(
            f"{ours}.qkvz_proj.weight", {f"{theirs}.{x}_proj.weight": n for x, n in {**sizes, "g": values}.items()}
        )
        yield rows(f"{ours}.ba_proj.weight", {f"{theirs}.{x}_proj.weight": self.linear_num_value_heads for x in "ba"})
        yield from delta_rules(ours, theirs, sizes, self.linear_conv_kernel_dim)
        for name in ("A_log", "dt_bias"):
            yield same(f"{ours}.{name}", f"{theirs}.{name}")
        yield same(f"{ours}.norm_weight", f"{theirs}.o_norm.weight")
        yield same(f"{ours}.o_proj.weight", f"{theirs}.o_proj.weight")
