"""Ling 3.0 (`bailing_hybrid`): `kda` with bounded decays, `mla` with positions and a gate for each head, experts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from swamla.interop.architectures.deepseek import predicts_further
from swamla.interop.architectures.kimi import KimiLinear
from swamla.interop.equality import Lacks, mixer_of
from swamla.interop.rope import RopeParameters, rope_in_one_place
from swamla.interop.stack import delta_rules, expert_rules, swiglu_rules
from swamla.interop.weights import Rule, rows, same
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.kda import KDAConfig
from swamla.model.mixers.mla import MLAConfig
from swamla.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class BailingHybrid(KimiLinear):
    """Ling 3.0; the names of weights are those of its files, which transformers reads and writes.

    kda_safe_gate: whether log α is above −5.
    num_nextn_predict_layers: layers behind the others that predict further tokens; they are not read.
    """

    kind: ClassVar[str] = "bailing_hybrid"
    class_name: ClassVar[str] = "BailingHybridForCausalLM"
    fixed: ClassVar[Mapping[str, Any]] = {
        "attention_bias": False,
        "kda_lower_bound": -5.0,
        "q_lora_rank": None,
        "tie_word_embeddings": False,  # transformers never ties them
    }
    also_named: ClassVar[Mapping[str, str]] = {
        "norm_topk_prob": "moe_renormalize",
        "n_group": "num_expert_group",
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_token",
        "n_shared_experts": "num_shared_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
        "short_conv_kernel_size": "linear_conv_kernel_dim",
    }
    harmless: ClassVar[frozenset[str]] = frozenset(
        {
            "first_k_dense_replace",
            "head_dim",
            "layer_group_size",
            "model_max_length",
            "mtp_loss_scaling_factor",
            "num_key_value_heads",
            "qk_head_dim",
        }
    )
    unwritten: ClassVar[frozenset[str]] = frozenset({"q_lora_rank"})
    renamed: ClassVar[Mapping[str, str]] = {}
    embedding: ClassVar[str] = "model.word_embeddings.weight"
    rms_norm_eps: float = 1e-6
    moe_intermediate_size: int = 768
    num_experts: int = 512
    num_expert_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    rope_parameters: RopeParameters = field(default_factory=lambda: RopeParameters(rope_theta=6e6))
    kda_safe_gate: bool = True
    num_nextn_predict_layers: int = 0

    @classmethod
    def example(cls) -> Self:
        """As Kimi Linear's, with one group of experts."""
        return replace(super().example(), num_expert_group=1, topk_group=1)

    @classmethod
    def modern(cls, plain: Mapping[str, Any]) -> dict[str, Any]:
        """With the kinds of layers, which files of the hub give by two numbers."""
        plain = {key: value for key, value in plain.items() if value is not None}
        depth, every = int(plain.get("num_hidden_layers", 0)), plain.get("layer_group_size", 6)
        dense = plain.get("first_k_dense_replace", 2)
        missing = {
            "layer_types": ["linear_attention" if (i + 1) % every else "full_attention" for i in range(depth)],
            "mlp_layer_types": ["dense" if i < dense else "sparse" for i in range(depth)],
            "linear_head_dim": plain.get("head_dim", 128),
            "linear_num_heads": plain.get("num_attention_heads"),
            "rope_theta": 6e6,
        }
        return rope_in_one_place(missing | plain)

    def plain(self) -> dict[str, Any]:
        """The config.json, with the names that files of the hub have."""
        return {
            **super().plain(),
            "head_dim": self.linear_head_dim,
            "short_conv_kernel_size": self.linear_conv_kernel_dim,
        }

    def leaves_out(self, name: str) -> bool:
        """Also layers that predict further tokens."""
        return super().leaves_out(name) or predicts_further(name, self.num_hidden_layers, self.num_nextn_predict_layers)

    def kda(self) -> KDAConfig:
        """The mixer of linear attention."""
        kda = replace(super().kda(), gate="sigmoid", decay_rank=0)
        return replace(kda, decay="safe") if self.kda_safe_gate else kda

    def mla(self) -> MLAConfig:
        """The mixer of the other layers."""
        rope = self.rope_parameters.rope("interleaved", sharpens_softmax=True)
        return replace(super().mla(), rope=rope, gate="head")

    @classmethod
    def of(cls, config: LanguageModelConfig) -> Self:
        """The one that has the settings of a model of ours, as far as it has them."""
        if config.tied_head:
            raise Lacks(cls.kind, "tied_head", True, "False")
        rope, safe = mixer_of(cls.kind, config, MLAConfig).rope, mixer_of(cls.kind, config, KDAConfig).decay == "safe"
        rope_parameters = RopeParameters() if rope is None else RopeParameters.of(rope)
        return replace(super().of(config), rope_parameters=rope_parameters, kda_safe_gate=safe)

    def mixer_rules(self, kind: str, ours: str, theirs: str) -> Iterator[Rule]:
        """The weights of one mixer."""
        rules = self.mla_rules if kind.startswith("full_attention") else self.kda_rules
        return rules(ours, f"{theirs}.attention")

    def mla_rules(self, ours: str, theirs: str) -> Iterator[Rule]:
        """The weights of `mla`."""
        for name in ("q_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "g_proj"):
            yield same(f"{ours}.{name}.weight", f"{theirs}.{name}.weight")
        yield same(f"{ours}.o_proj.weight", f"{theirs}.dense.weight")

    def kda_rules(self, ours: str, theirs: str) -> Iterator[Rule]:
        """The weights of `kda`."""
        heads, wide = self.linear_num_heads, self.linear_num_heads * self.linear_head_dim
        yield rows(f"{ours}.qkvz_proj.weight", {f"{theirs}.{x}_proj.weight": wide for x in "qkvg"})
        yield rows(f"{ours}.ba_proj.weight", {f"{theirs}.b_proj.weight": heads, f"{theirs}.f_proj.weight": wide})
        yield from delta_rules(ours, theirs, dict.fromkeys("qkv", wide), self.linear_conv_kernel_dim)
        for name in ("A_log", "dt_bias"):
            yield same(f"{ours}.{name}", f"{theirs}.{name}")
        yield same(f"{ours}.norm_weight", f"{theirs}.o_norm.weight")
        yield same(f"{ours}.o_proj.weight", f"{theirs}.dense.weight")

    def ffn_rules(self, kind: str, ours: str, theirs: str) -> Iterator[Rule]:
        """The weights of a dense FFN or of router, experts and shared experts."""
        theirs = f"{theirs}.mlp"
        if kind.endswith(" dense"):
            yield from swiglu_rules(ours, theirs, self.intermediate_size)
            return
        yield same(f"{ours}.router.weight", f"{theirs}.gate.weight")
        yield same(f"{ours}.router.bias", f"{theirs}.gate.expert_bias")
        yield from expert_rules(f"{ours}.experts", f"{theirs}.experts", self.num_experts)
        if self.num_shared_experts:
            hidden = self.num_shared_experts * self.moe_intermediate_size
            yield from swiglu_rules(f"{ours}.shared", f"{theirs}.shared_experts", hidden)
