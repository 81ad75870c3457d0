"""OLMo 2, 3 and Hybrid: norms behind attention and FFN, queries and keys normalised over all heads together."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

from swamla.errors import ConfigError
from swamla.interop.architectures.llama import LayerType, LlamaLike, windows_of
from swamla.interop.equality import mixer_of
from swamla.interop.rope import RopeParameters, rope_in_one_place
from swamla.interop.stack import delta_rules
from swamla.interop.weights import Rule, rows, same
from swamla.model.block import BlockConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.gdn import GDNConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.model.rope import RopeConfig
from swamla.registry import register

Kind = Literal["linear_attention", "full_attention"]
OLMO3_BASE = 500000.0  # of positions, where the config.json does not say


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
class Olmo3(Olmo2):
    """OLMo 3: layers that see a window and layers that see all tokens, each kind with positions of its own.

    rope_parameters: of layers that see all tokens; the config.json has both under this name.
    sliding_rope_parameters: of layers with a window.
    """

    kind: ClassVar[str] = "olmo3"
    class_name: ClassVar[str] = "Olmo3ForCausalLM"
    sliding_window: int | None = 4096
    layer_types: tuple[LayerType, ...]
    rope_parameters: RopeParameters = field(default_factory=lambda: RopeParameters(rope_theta=OLMO3_BASE))
    sliding_rope_parameters: RopeParameters = field(default_factory=lambda: RopeParameters(rope_theta=OLMO3_BASE))

    @classmethod
    def example(cls) -> Self:
        """One layer of each kind."""
        return cls(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            sliding_window=7,
            layer_types=("sliding_attention", "full_attention"),
            sliding_rope_parameters=RopeParameters(rope_theta=1e4),
        )

    @classmethod
    def modern(cls, plain: Mapping[str, Any]) -> dict[str, Any]:
        """With the kinds of layers. Older files have one base for both, and scale positions only without a window."""
        depth, given = int(plain.get("num_hidden_layers") or 0), plain.get("rope_parameters") or {}
        if given.keys() - {"full_attention", "sliding_attention"}:
            raise ConfigError("rope_parameters", given, "must be a table of full_attention and sliding_attention")
        types = [f"{'full' if (i + 1) % 4 == 0 else 'sliding'}_attention" for i in range(depth)]
        plain = {"rope_theta": OLMO3_BASE, "layer_types": types, **{k: v for k, v in plain.items() if v is not None}}
        full = given.get("full_attention") or plain.get("rope_scaling") or {}
        ropes = [
            rope_in_one_place({**plain, "rope_scaling": None, "rope_parameters": rope})["rope_parameters"]
            for rope in (full, given.get("sliding_attention") or {})
        ]
        return {**plain, "rope_parameters": ropes[0], "sliding_rope_parameters": ropes[1]}

    def plain(self) -> dict[str, Any]:
        """The config.json, with the positions of both kinds in one place."""
        found = super().plain()
        del found["sliding_rope_parameters"]
        ropes = {"full_attention": self.rope_parameters, "sliding_attention": self.sliding_rope_parameters}
        return {**found, "rope_parameters": {kind: rope.plain() for kind, rope in ropes.items()}}

    @property
    def layer_kinds(self) -> Sequence[str]:
        """As the config says."""
        return self.layer_types

    @property
    def window(self) -> int:
        """Tokens that a layer of sliding attention sees."""
        return self.sliding_window or 0

    def block(self, kind: str) -> tuple[str, BlockConfig]:
        """A layer with the positions of its kind."""
        name, block = super().block(kind)
        if kind == "full_attention":
            return name, block
        assert isinstance(block.mixer, SWAConfig)
        return name, replace(block, mixer=replace(block.mixer, rope=self.sliding_rope_parameters.rope("half")))

    @classmethod
    def of(cls, config: LanguageModelConfig) -> Self:
        """The one that has the settings of a model of ours, as far as it has them."""
        found = super().of(config)
        mixers = [block.mixer for block in config.layers]
        ropes = {type(mixer): mixer.rope for mixer in mixers if isinstance(mixer, MHAConfig) and mixer.rope}
        full, sliding = (
            RopeParameters.of(ropes[kind]) if kind in ropes else found.rope_parameters
            for kind in (MHAConfig, SWAConfig)
        )
        return replace(found, rope_parameters=full, sliding_rope_parameters=sliding)

    @classmethod
    def details(cls, config: LanguageModelConfig) -> dict[str, Any]:
        """The window, and which layers have it."""
        return {**super().details(config), **windows_of(config)}


@register
@dataclass(frozen=True, kw_only=True)
class OlmoHybrid(Olmo2):
    """OLMo Hybrid: OLMo 2's attention, and gated DeltaNet with β up to 2 and norms before mixer and FFN.

    Attention has no positions where rope_theta is None.
    """

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
    without_rope: ClassVar[RopeParameters] = RopeParameters(rope_theta=None)
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

    @property
    def rope(self) -> RopeConfig | None:
        """Rotary positions, or none."""
        return None if self.rope_parameters.rope_theta is None else super().rope

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
