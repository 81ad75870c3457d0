"""DeepSeek-V3 (arXiv 2412.19437) and V2 (arXiv 2405.04434): latent attention, and experts behind a few dense layers."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch

from swamla.interop.equality import Lacks, ffn_of, mixer_of
from swamla.interop.rope import RopeParameters
from swamla.interop.stack import Stack, dense_hidden, expert_rules, routed, swiglu_rules
from swamla.interop.weights import Rule, constant, same
from swamla.model.block import BlockConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.ffns.moe import MoEConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.mla import MLAConfig
from swamla.registry import register


@dataclass(frozen=True, kw_only=True)
class LatentStack(Stack):
    """`mla` in every layer; a dense FFN in the first layers, experts in the others."""

    num_attention_heads: int
    num_key_value_heads: int | None = None
    kv_lora_rank: int = 512
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    max_position_embeddings: int = 4096
    rope_parameters: RopeParameters = field(default_factory=RopeParameters)
    moe_intermediate_size: int = 2048
    num_experts_per_tok: int = 8
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    n_group: int | None = 1
    topk_group: int | None = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = 0
    harmless: ClassVar[frozenset[str]] = frozenset({"head_dim", "qk_head_dim"})  # sums of others
    fixed: ClassVar[Mapping[str, Any]] = {"attention_bias": False, "mlp_bias": False, "moe_layer_freq": 1}

    @classmethod
    def example(cls) -> Self:
        """A dense layer, and one with four experts in two groups."""
        return cls(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            kv_lora_rank=16,
            q_lora_rank=24,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=12,
            moe_intermediate_size=16,
            num_experts_per_tok=2,
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
        )

    @property
    def layer_kinds(self) -> Sequence[str]:
        """The kind of every layer."""
        return ["dense" if index < self.first_k_dense_replace else "sparse" for index in range(self.num_hidden_layers)]

    @property
    def interleaved(self) -> bool:
        """Whether neighbouring elements are rotated together."""
        return True

    def mixer(self) -> MLAConfig:
        """The mixer of every layer."""
        return MLAConfig(
            n_heads=self.num_attention_heads,
            kv_lora_rank=self.kv_lora_rank,
            q_lora_rank=self.q_lora_rank or 0,
            qk_nope_head_dim=self.qk_nope_head_dim,
            qk_rope_head_dim=self.qk_rope_head_dim,
            v_head_dim=self.v_head_dim,
            rope=self.rope_parameters.rope("interleaved" if self.interleaved else "half", sharpens_softmax=True),
        )

    def experts(self) -> MoEConfig:
        """The FFN of the layers that are not dense."""
        return MoEConfig(
            n_experts=self.n_routed_experts,
            n_activated=self.num_experts_per_tok,
            n_shared=self.n_shared_experts,
            expert_hidden=self.moe_intermediate_size,
            normalise=self.norm_topk_prob,
            scale=self.routed_scaling_factor,
            groups=self.n_group or 1,
            groups_used=self.topk_group or 1,
        )

    def block(self, kind: str) -> tuple[str, BlockConfig]:
        """A dense layer, or one with experts."""
        if kind == "dense":
            return "dense", BlockConfig(mixer=self.mixer(), ffn=DenseConfig(hidden=self.intermediate_size))
        return "mla", BlockConfig(mixer=self.mixer(), ffn=self.experts())

    @classmethod
    def of(cls, config: LanguageModelConfig) -> Self:
        """The one that has the settings of a model of ours, as far as it has them."""
        mla = mixer_of(cls.kind, config, MLAConfig)
        dense = [isinstance(block.ffn, DenseConfig) for block in config.layers]
        first = dense.index(False) if False in dense else len(dense)
        experts = {} if all(dense) else cls.expert_details(ffn_of(cls.kind, config, MoEConfig), config.width)
        rope = RopeParameters() if mla.rope is None else RopeParameters.of(mla.rope)
        return cls(
            **cls.size_of(config),
            intermediate_size=dense_hidden(config) or 1,
            num_key_value_heads=mla.n_heads,
            **latent_fields(mla),
            rope_parameters=rope,
            first_k_dense_replace=first,
            **cls.details(mla),
            **experts,
        )

    @classmethod
    def details(cls, mla: MLAConfig) -> dict[str, Any]:
        """The fields that only this architecture has."""
        return {}

    @classmethod
    def expert_details(cls, moe: MoEConfig, width: int) -> dict[str, Any]:
        """The settings of the experts."""
        routed_width, shared = moe.expert_dim(width), moe.shared_config(width)
        if shared is not None and shared.hidden_dim(width) % routed_width:
            raise Lacks(cls.kind, "shared_hidden", moe.shared_hidden, f"a multiple of the experts' {routed_width}")
        return {
            "moe_intermediate_size": routed_width,
            "n_routed_experts": moe.n_experts,
            "n_shared_experts": shared.hidden_dim(width) // routed_width if shared else 0,
            **routed(moe),
        }

    def mixer_rules(self, kind: str, ours: str, theirs: str) -> Iterator[Rule]:
        """The weights of `mla`, under the same names."""
        return latent_rules(ours, f"{theirs}.self_attn", self.q_lora_rank)

    def ffn_rules(self, kind: str, ours: str, theirs: str) -> Iterator[Rule]:
        """The weights of a dense FFN or of router, experts and shared experts."""
        if kind == "dense":
            yield from swiglu_rules(ours, f"{theirs}.mlp", self.intermediate_size)
            return
        yield from self.router_rules(f"{ours}.router", f"{theirs}.mlp.gate")
        yield from expert_rules(f"{ours}.experts", f"{theirs}.mlp.experts", self.n_routed_experts)
        if self.n_shared_experts:
            hidden = self.n_shared_experts * self.moe_intermediate_size
            yield from swiglu_rules(f"{ours}.shared", f"{theirs}.mlp.shared_experts", hidden)

    def router_rules(self, ours: str, theirs: str) -> Iterator[Rule]:
        """The router's weights and the bias that balances it."""
        yield same(f"{ours}.weight", f"{theirs}.weight")
        yield same(f"{ours}.bias", f"{theirs}.e_score_correction_bias")


def predicts_further(name: str, depth: int, further: int) -> bool:
    """Whether a weight is one of the `further` layers behind `depth` others, which predict tokens after the next."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return layer is not None and depth <= int(layer[1]) < depth + further


def latent_fields(mla: MLAConfig) -> dict[str, Any]:
    """The sizes of `mla` under the names of a config.json."""
    return {
        "num_attention_heads": mla.n_heads,
        "kv_lora_rank": mla.kv_lora_rank,
        "q_lora_rank": mla.q_lora_rank or None,
        "qk_nope_head_dim": mla.qk_nope_head_dim,
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
    }


def latent_rules(ours: str, theirs: str, q_lora_rank: int | None) -> Iterator[Rule]:
    """The weights of `mla`, whose names are DeepSeek's."""
    queries = ("q_a_proj", "q_a_layernorm", "q_b_proj") if q_lora_rank else ("q_proj",)
    for name in (*queries, "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"):
        yield same(f"{ours}.{name}.weight", f"{theirs}.{name}.weight")


@register
@dataclass(frozen=True, kw_only=True)
class DeepseekV3(LatentStack):
    """DeepSeek-V3: sigmoid scores, groups by the sum of their two best experts, a balancing bias.

    num_nextn_predict_layers: layers behind the others that predict further tokens; they are not read.
    """

    kind: ClassVar[str] = "deepseek_v3"
    class_name: ClassVar[str] = "DeepseekV3ForCausalLM"
    fixed: ClassVar[Mapping[str, Any]] = {
        **LatentStack.fixed,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    q_lora_rank: int | None = 1536
    n_group: int | None = 8
    topk_group: int | None = 4
    routed_scaling_factor: float = 2.5
    first_k_dense_replace: int = 3
    rope_interleave: bool = True
    num_nextn_predict_layers: int = 0

    @property
    def interleaved(self) -> bool:
        """As the config says."""
        return self.rope_interleave

    def leaves_out(self, name: str) -> bool:
        """Also layers that predict further tokens."""
        return super().leaves_out(name) or predicts_further(name, self.num_hidden_layers, self.num_nextn_predict_layers)

    @classmethod
    def details(cls, mla: MLAConfig) -> dict[str, Any]:
        """How positions rotate."""
        return {"rope_interleave": mla.rope is None or mla.rope.layout == "interleaved"}


@register
@dataclass(frozen=True, kw_only=True)
class DeepseekV2(LatentStack):
    """DeepSeek-V2: softmax scores as weights, perhaps groups by their best expert, no bias."""

    kind: ClassVar[str] = "deepseek_v2"
    class_name: ClassVar[str] = "DeepseekV2ForCausalLM"
    fixed: ClassVar[Mapping[str, Any]] = {
        **LatentStack.fixed,
        "scoring_func": "softmax",
        "norm_topk_prob": False,  # transformers never normalises; DeepSeek's own code then leaves the scale out
    }
    q_lora_rank: int | None = 1536
    num_experts_per_tok: int = 6
    n_routed_experts: int = 64
    n_shared_experts: int = 2
    norm_topk_prob: bool = False
    topk_method: Literal["greedy", "group_limited_greedy"] = "greedy"

    def experts(self) -> MoEConfig:
        """The FFN of the layers that are not dense."""
        limited = self.topk_method == "group_limited_greedy"
        return replace(
            super().experts(),
            score="softmax",
            normalise=False,
            groups=(limited and self.n_group) or 1,
            groups_used=(limited and self.topk_group) or 1,
            group_score="max",
            bias_rate=0.0,
        )

    @classmethod
    def expert_details(cls, moe: MoEConfig, width: int) -> dict[str, Any]:
        """The settings of the experts."""
        method = "greedy" if moe.groups == 1 else "group_limited_greedy"
        return {**super().expert_details(moe, width), "topk_method": method, "norm_topk_prob": False}

    def router_rules(self, ours: str, theirs: str) -> Iterator[Rule]:
        """The router's weights; its bias is 0."""
        yield same(f"{ours}.weight", f"{theirs}.weight")
        yield constant(f"{ours}.bias", torch.zeros(self.n_routed_experts))
