"""Qwen's models with softmax-routed experts: Qwen3-MoE and Qwen3-Next."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch

from swamla.interop.architectures.llama import LlamaLike, Qwen3
from swamla.interop.architectures.qwen import QwenHybrid
from swamla.interop.equality import ffn_of
from swamla.interop.stack import dense_hidden, expert_rules, swiglu_rules
from swamla.interop.weights import Rule, constant, gathered, same
from swamla.model.block import BlockConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.ffns.moe import MoEConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.registry import register


@dataclass(frozen=True, kw_only=True)
class QwenMoE(LlamaLike):
    """Experts in every layer, but in mlp_only_layers and where decoder_sparse_step does not divide the layer's number.

    The class behind it in the order of bases says what the mixers are.
    """

    moe_intermediate_size: int
    num_experts_per_tok: int
    num_experts: int
    norm_topk_prob: bool
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    @property
    def layer_kinds(self) -> Sequence[str]:
        """The kind of every layer: of its mixer, and of its FFN."""
        return [f"{kind} {self._ffn_kind(index)}" for index, kind in enumerate(super().layer_kinds)]

    def _ffn_kind(self, index: int) -> str:
        dense = index in self.mlp_only_layers or (index + 1) % self.decoder_sparse_step
        return "dense" if dense or not self.num_experts else "sparse"

    def experts(self) -> MoEConfig:
        """The FFN of the layers that are not dense."""
        return MoEConfig(
            n_experts=self.num_experts,
            n_activated=self.num_experts_per_tok,
            n_shared=0,
            expert_hidden=self.moe_intermediate_size,
            score="softmax",
            normalise=self.norm_topk_prob,
            bias_rate=0.0,
        )

    def block(self, kind: str) -> tuple[str, BlockConfig]:
        """A mixer with a dense FFN or with experts."""
        mixer, ffn = kind.split()
        name, block = super().block(mixer)
        return (f"{name}_dense", block) if ffn == "dense" else (name, replace(block, ffn=self.experts()))

    @classmethod
    def ffn_details(cls, config: LanguageModelConfig) -> dict[str, Any]:
        """The settings of dense FFNs and of experts."""
        moe = ffn_of(cls.kind, config, MoEConfig)
        return {
            "intermediate_size": dense_hidden(config) or 1,
            "moe_intermediate_size": moe.expert_dim(config.width),
            "num_experts_per_tok": moe.n_activated,
            "num_experts": moe.n_experts,
            "norm_topk_prob": moe.normalise,
            "mlp_only_layers": tuple(i for i, block in enumerate(config.layers) if isinstance(block.ffn, DenseConfig)),
        }

    def mixer_rules(self, kind: str, ours: str, theirs: str) -> Iterator[Rule]:
        """The weights of one mixer."""
        return super().mixer_rules(kind.split()[0], ours, theirs)

    def ffn_rules(self, kind: str, ours: str, theirs: str) -> Iterator[Rule]:
        """The weights of one FFN; the router has no bias."""
        if kind.endswith(" dense"):
            yield from super().ffn_rules(kind, ours, theirs)
            return
        yield same(f"{ours}.router.weight", f"{theirs}.mlp.gate.weight")
        yield constant(f"{ours}.router.bias", torch.zeros(self.num_experts))
        yield from expert_rules(f"{ours}.experts", f"{theirs}.mlp.experts", self.num_experts)


@register
@dataclass(frozen=True, kw_only=True)
class Qwen3Moe(QwenMoE, Qwen3):
    """Qwen3 with experts (arXiv 2505.09388), none of them shared."""

    kind: ClassVar[str] = "qwen3_moe"
    class_name: ClassVar[str] = "Qwen3MoeForCausalLM"
    num_key_value_heads: int | None = 4
    head_dim: int | None = None
    also_named: ClassVar[Mapping[str, str]] = {"num_local_experts": "num_experts"}
    moe_intermediate_size: int = 768
    num_experts_per_tok: int = 8
    num_experts: int = 128
    norm_topk_prob: bool = False

    @classmethod
    def example(cls) -> Self:
        """Two layers, the second with a dense FFN."""
        return replace(
            super().example(), moe_intermediate_size=16, num_experts_per_tok=2, num_experts=4, mlp_only_layers=(1,)
        )

    @classmethod
    def details(cls, config: LanguageModelConfig) -> dict[str, Any]:
        """Those of the FFNs."""
        return cls.ffn_details(config)


@register
@dataclass(frozen=True, kw_only=True)
class Qwen3Next(QwenMoE, QwenHybrid):
    """Qwen3-Next: Qwen's hybrid with experts, and a gated shared one."""

    kind: ClassVar[str] = "qwen3_next"
    class_name: ClassVar[str] = "Qwen3NextForCausalLM"
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    num_experts_per_tok: int = 10
    num_experts: int = 512
    norm_topk_prob: bool = True

    @classmethod
    def example(cls) -> Self:
        """One layer of each kind, the second with a dense FFN."""
        return replace(
            super().example(),
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
            num_experts_per_tok=2,
            num_experts=4,
            mlp_only_layers=(1,),
        )

    def experts(self) -> MoEConfig:
        """The FFN of the layers that are not dense."""
        shared = self.shared_expert_intermediate_size
        return replace(super().experts(), n_shared=1, shared_hidden=shared, shared_gate="sigmoid")

    @classmethod
    def ffn_details(cls, config: LanguageModelConfig) -> dict[str, Any]:
        """With the shared expert's."""
        shared = ffn_of(cls.kind, config, MoEConfig).shared_config(config.width)
        hidden = shared.hidden_dim(config.width) if shared else 1
        return {**super().ffn_details(config), "shared_expert_intermediate_size": hidden}

    def gdn_projections(self, ours: str, theirs: str) -> Iterator[Rule]:
        """Theirs have, for each key head in turn, query, key, its values and gates; and its β and α."""
        key, value, groups = self.linear_key_head_dim, self.linear_value_head_dim, self.linear_num_key_heads
        heads = self.linear_num_value_heads // groups
        sizes = [key, key, heads * value, heads * value]
        whole = sum(sizes)
        starts = [sum(sizes[:part]) for part in range(4)]
        index = [g * whole + starts[part] + i for part in range(4) for g in range(groups) for i in range(sizes[part])]
        yield gathered(f"{ours}.qkvz_proj.weight", {f"{theirs}.in_proj_qkvz.weight": whole * groups}, index)
        index = [g * 2 * heads + part * heads + i for part in range(2) for g in range(groups) for i in range(heads)]
        yield gathered(f"{ours}.ba_proj.weight", {f"{theirs}.in_proj_ba.weight": 2 * heads * groups}, index)

    def ffn_rules(self, kind: str, ours: str, theirs: str) -> Iterator[Rule]:
        """The weights of one FFN."""
        yield from super().ffn_rules(kind, ours, theirs)
        if kind.endswith(" sparse"):
            shared = f"{theirs}.mlp.shared_expert"
            yield from swiglu_rules(f"{ours}.shared", shared, self.shared_expert_intermediate_size)
            yield same(f"{ours}.shared_gate", f"{shared}_gate.weight")
