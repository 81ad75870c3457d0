"""Qwen's hybrids of gated DeltaNet and gated attention; Qwen3.5 (text). Qwen3-Next, with experts: qwen_moe.py."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from swamla.interop.architectures.llama import LlamaLike
from swamla.interop.equality import mixer_of
from swamla.interop.rope import RopeParameters, rope_in_one_place
from swamla.interop.weights import Rule, convolution, gathered, rows, same, scaled, shifted
from swamla.model.block import BlockConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.gdn import GDNConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.registry import register

Sparse = Literal["dense", "sparse"]
Kind = Literal["linear_attention", "full_attention"]
PARTIAL = 0.25  # share of a head that is rotated, where the config.json does not say


@dataclass(frozen=True, kw_only=True)
class QwenHybrid(LlamaLike):
    """`gdn` and `mha` with gate, normalised queries and keys, and positions in a part of each head. Gains are less 1.

    ungated: the attention layers of ours have no gate: theirs is made .5 everywhere, and the output projection doubled.
    """

    fixed: ClassVar[Mapping[str, Any]] = {"attention_bias": False, "attn_output_gate": True}
    unwritten: ClassVar[frozenset[str]] = frozenset({"ungated"})
    surplus: ClassVar[str] = rf"{LlamaLike.surplus}|mtp\..*|model\.visual\..*"
    # Read by `modern`, or of the layers that predict further tokens and of other programs' recurrence.
    harmless: ClassVar[frozenset[str]] = frozenset(
        {
            "full_attention_interval",
            "mamba_ssm_dtype",
            "mtp_num_hidden_layers",
            "mtp_use_dedicated_embeddings",
            "partial_rotary_factor",
        }
    )
    gain = staticmethod(shifted)
    head_dim: int | None = 256
    linear_conv_kernel_dim: int = 4
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32
    layer_types: tuple[Kind, ...]
    ungated: bool = False

    @classmethod
    def example(cls) -> Self:
        """One layer of each kind."""
        return cls(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            linear_key_head_dim=8,
            linear_value_head_dim=12,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            layer_types=("linear_attention", "full_attention"),
            rope_parameters=RopeParameters(partial_rotary_factor=PARTIAL),
        )

    @classmethod
    def modern(cls, plain: Mapping[str, Any]) -> dict[str, Any]:
        """With the kinds of layers, which older files give by an interval."""
        every, depth = plain.get("full_attention_interval", 4), plain.get("num_hidden_layers")
        kinds = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(int(depth or 0))]
        return {"layer_types": kinds, **rope_in_one_place(plain, PARTIAL)}

    @property
    def layer_kinds(self) -> Sequence[str]:
        """As the config says."""
        return self.layer_types

    @property
    def rope_width(self) -> int:
        """Elements of a head that are rotated."""
        return int(self.head_width * self.rope_parameters.partial_rotary_factor)

    def attention(self) -> dict[str, Any]:
        """The settings of `mha`."""
        return {
            **super().attention(),
            "rope_dim": None if self.rope_width == self.head_width else self.rope_width,
            "gate": "none" if self.ungated else "sigmoid",
            "qk_norm": "head",
            "norm_eps": self.rms_norm_eps,
        }

    def gdn(self) -> GDNConfig:
        """The mixer of linear attention."""
        return GDNConfig(
            n_heads=self.linear_num_value_heads,
            n_key_heads=self.linear_num_key_heads,
            head_k_dim=self.linear_key_head_dim,
            head_v_dim=self.linear_value_head_dim,
            conv=self.linear_conv_kernel_dim,
            norm_eps=self.rms_norm_eps,
        )

    def block(self, kind: str) -> tuple[str, BlockConfig]:
        """Linear or gated attention."""
        return (
            ("gdn", BlockConfig(mixer=self.gdn(), ffn=self.ffn()))
            if kind == "linear_attention"
            else super().block(kind)
        )

    @classmethod
    def details(cls, config: LanguageModelConfig) -> dict[str, Any]:
        """The settings of linear attention, which layers are it, and whether the others have a gate."""
        mha, gdn = mixer_of(cls.kind, config, MHAConfig), mixer_of(cls.kind, config, GDNConfig)
        key, value = gdn.head_dims(config.width)
        local = [isinstance(block.mixer, GDNConfig) for block in config.layers]
        return {
            **cls.ffn_details(config),
            "linear_conv_kernel_dim": gdn.conv,
            "linear_key_head_dim": key,
            "linear_value_head_dim": value,
            "linear_num_key_heads": gdn.key_heads,
            "linear_num_value_heads": gdn.n_heads,
            "layer_types": tuple("linear_attention" if each else "full_attention" for each in local),
            "ungated": mha.gate == "none",
        }

    @classmethod
    def ffn_details(cls, config: LanguageModelConfig) -> dict[str, Any]:
        """The FFN's settings."""
        return super().details(config)

    def mixer_rules(self, kind: str, ours: str, theirs: str) -> Iterator[Rule]:
        """The weights of one mixer."""
        if kind == "full_attention":
            yield from self._attention_rules(ours, f"{theirs}.self_attn")
        else:
            yield from self._gdn_rules(ours, f"{theirs}.linear_attn")

    def _attention_rules(self, ours: str, theirs: str) -> Iterator[Rule]:
        """Their q_proj has each head's query and gate; they rotate the first elements of a head, we the last."""
        head, heads, kv = self.head_width, self.num_attention_heads, self.kv_heads
        turned = [*range(self.rope_width, head), *range(self.rope_width)]
        values = 2 * heads * head + kv * head
        index = [2 * head * h + i for h in range(heads) for i in turned]
        index += [2 * heads * head + head * h + i for h in range(kv) for i in turned]
        index += range(values, values + kv * head)
        if not self.ungated:
            index += [2 * head * h + head + i for h in range(heads) for i in range(head)]
        sizes = {"q": 2 * heads * head, "k": kv * head, "v": kv * head}
        yield gathered(f"{ours}.qkv_proj.weight", {f"{theirs}.{x}_proj.weight": n for x, n in sizes.items()}, index)
        for norm in ("q_norm", "k_norm"):
            yield shifted(f"{ours}.{norm}.weight", f"{theirs}.{norm}.weight", turned)
        yield scaled(f"{ours}.o_proj.weight", f"{theirs}.o_proj.weight", 2.0 if self.ungated else 1.0)

    def _gdn_rules(self, ours: str, theirs: str) -> Iterator[Rule]:
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        values = self.linear_num_value_heads * self.linear_value_head_dim
        channels, taps = 2 * keys + values, self.linear_conv_kernel_dim
        yield from self.gdn_projections(ours, theirs)
        yield convolution(f"{ours}.conv_weight", {f"{theirs}.conv1d.weight": channels}, taps)
        for name in ("A_log", "dt_bias"):
            yield same(f"{ours}.{name}", f"{theirs}.{name}")
        yield same(f"{ours}.norm_weight", f"{theirs}.norm.weight")
        yield same(f"{ours}.o_proj.weight", f"{theirs}.out_proj.weight")

    def gdn_projections(self, ours: str, theirs: str) -> Iterator[Rule]:
        """Those of queries, keys, values, gate, and of β and α."""
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        values = self.linear_num_value_heads * self.linear_value_head_dim
        sizes = {f"{theirs}.in_proj_qkv.weight": 2 * keys + values, f"{theirs}.in_proj_z.weight": values}
        yield rows(f"{ours}.qkvz_proj.weight", sizes)
        gates = {f"{theirs}.in_proj_{x}.weight": self.linear_num_value_heads for x in "ba"}
        yield rows(f"{ours}.ba_proj.weight", gates)


@register
@dataclass(frozen=True, kw_only=True)
class Qwen3_5(QwenHybrid):
    """The text model of Qwen3.5: a dense FFN in every layer."""

    kind: ClassVar[str] = "qwen3_5_text"
    class_name: ClassVar[str] = "Qwen3_5ForCausalLM"
    inside: ClassVar[tuple[str, ...]] = ("qwen3_5",)
    renamed: ClassVar[Mapping[str, str]] = {r"^model\.language_model\.": "model."}
