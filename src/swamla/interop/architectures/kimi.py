"""Kimi Linear (arXiv 2510.26692): `kda` and `mla` without positions, experts behind a few dense layers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from swamla.interop.architectures.deepseek import latent_fields, latent_rules
from swamla.interop.equality import Lacks, ffn_of, mixer_of
from swamla.interop.stack import Stack, delta_rules, dense_hidden, expert_rules, swiglu_rules
from swamla.interop.weights import Rule, reshaped, rows, same
from swamla.model.block import BlockConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.ffns.ffn import FFNConfig
from swamla.model.ffns.moe import MoEConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.kda import KDAConfig
from swamla.model.mixers.mixer import MixerConfig
from swamla.model.mixers.mla import MLAConfig
from swamla.registry import register

Kind = Literal["linear_attention", "full_attention"]


@register
@dataclass(frozen=True, kw_only=True)
class KimiLinear(Stack):
    """Kimi Linear; layer_types and mlp_layer_types say what each layer has."""

    kind: ClassVar[str] = "kimi_linear"
    class_name: ClassVar[str] = "KimiLinearForCausalLM"
    fixed: ClassVar[Mapping[str, Any]] = {
        "attention_bias": False,
        "mla_use_nope": True,
        "moe_layer_freq": 1,
        "moe_router_activation_func": "sigmoid",
        "use_grouped_topk": True,
    }
    harmless: ClassVar[frozenset[str]] = frozenset(
        {
            "first_k_dense_replace",
            "head_dim",
            "qk_head_dim",
            "linear_attn_config",
            "model_max_length",
            "num_key_value_heads",
            "rope_parameters",
        }
    )
    # transformers saves dense layers under the name of those with experts.
    renamed: ClassVar[Mapping[str, str]] = {r"\.block_sparse_moe\.(gate|up|down)_proj\.": r".mlp.\1_proj."}
    rms_norm_eps: float = 1e-5
    num_attention_heads: int
    kv_lora_rank: int = 512
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    linear_head_dim: int = 128
    linear_num_heads: int = 32
    linear_conv_kernel_dim: int = 4
    moe_intermediate_size: int = 1024
    num_experts: int = 256
    num_experts_per_token: int = 8
    num_shared_experts: int = 1
    num_expert_group: int = 1
    topk_group: int = 1
    moe_renormalize: bool = True
    routed_scaling_factor: float = 2.446
    layer_types: tuple[Kind, ...]
    mlp_layer_types: tuple[Literal["dense", "sparse"], ...]

    @classmethod
    def example(cls) -> Self:
        """A dense layer of linear attention, one with experts, and one of latent attention."""
        return cls(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=12,
            linear_head_dim=12,
            linear_num_heads=3,
            moe_intermediate_size=16,
            num_experts=4,
            num_experts_per_token=2,
            layer_types=("linear_attention", "linear_attention", "full_attention"),
            mlp_layer_types=("dense", "sparse", "sparse"),
        )

    def plain(self) -> dict[str, Any]:
        """The config.json, with as many heads of keys as of queries: transformers' eager attention divides them."""
        return super().plain() | {"num_key_value_heads": self.num_attention_heads}

    @classmethod
    def modern(cls, plain: Mapping[str, Any]) -> dict[str, Any]:
        """With the kinds of layers, which older files give as lists of layers counted from 1."""
        depth = int(plain.get("num_hidden_layers") or 0)
        linear, dense = plain.get("linear_attn_config") or {}, plain.get("first_k_dense_replace", 1)
        full = linear.get("full_attn_layers") or [layer + 1 for layer in range(depth) if layer and layer % 4 == 0]
        found: dict[str, Any] = {
            "layer_types": ["full_attention" if i + 1 in full else "linear_attention" for i in range(depth)],
            "mlp_layer_types": ["dense" if i < dense else "sparse" for i in range(depth)],
        }
        nested = {"linear_head_dim": "head_dim", "linear_num_heads": "num_heads"}
        nested["linear_conv_kernel_dim"] = "short_conv_kernel_size"
        found |= {name: linear[old] for name, old in nested.items() if old in linear}
        return {**found, **{key: value for key, value in plain.items() if value is not None}}

    @property
    def layer_kinds(self) -> Sequence[str]:
        """The kind of every layer: of its mixer, and of its FFN."""
        return [f"{mixer} {ffn}" for mixer, ffn in zip(self.layer_types, self.mlp_layer_types, strict=True)]

    def block(self, kind: str) -> tuple[str, BlockConfig]:
        """Linear or latent attention, a dense FFN or experts."""
        mixer: MixerConfig
        name, mixer = ("kda", self.kda()) if kind.startswith("linear_attention") else ("mla", self.mla())
        dense = kind.endswith(" dense")
        ffn: FFNConfig = DenseConfig(hidden=self.intermediate_size) if dense else self.experts()
        return f"{name}_dense" if dense else name, BlockConfig(mixer=mixer, ffn=ffn)

    def kda(self) -> KDAConfig:
        """The mixer of linear attention."""
        return KDAConfig(
            n_heads=self.linear_num_heads,
            head_k_dim=self.linear_head_dim,
            head_v_dim=self.linear_head_dim,
            conv=self.linear_conv_kernel_dim,
            norm_eps=self.rms_norm_eps,
        )

    def mla(self) -> MLAConfig:
        """The mixer of the other layers, without positions."""
        return MLAConfig(
            n_heads=self.num_attention_heads,
            kv_lora_rank=self.kv_lora_rank,
            q_lora_rank=self.q_lora_rank or 0,
            qk_nope_head_dim=self.qk_nope_head_dim,
            qk_rope_head_dim=self.qk_rope_head_dim,
            v_head_dim=self.v_head_dim,
            rope=None,
        )

    def experts(self) -> MoEConfig:
        """The FFN of the layers that are not dense."""
        return MoEConfig(
            n_experts=self.num_experts,
            n_activated=self.num_experts_per_token,
            n_shared=self.num_shared_experts,
            expert_hidden=self.moe_intermediate_size,
            normalise=self.moe_renormalize,
            scale=self.routed_scaling_factor,
            groups=self.num_expert_group,
            groups_used=self.topk_group,
        )

    @classmethod
    def of(cls, config: LanguageModelConfig) -> Self:
        """The one that has the settings of a model of ours, as far as it has them."""
        kda, mla = mixer_of(cls.kind, config, KDAConfig), mixer_of(cls.kind, config, MLAConfig)
        dense = [isinstance(block.ffn, DenseConfig) for block in config.layers]
        linear = [isinstance(block.mixer, KDAConfig) for block in config.layers]
        experts = {} if all(dense) else cls.expert_details(ffn_of(cls.kind, config, MoEConfig), config.width)
        return cls(
            **cls.size_of(config),
            intermediate_size=dense_hidden(config) or 1,
            **latent_fields(mla),
            linear_head_dim=kda.head_dims(config.width)[0],
            linear_num_heads=kda.n_heads,
            linear_conv_kernel_dim=kda.conv,
            layer_types=tuple("linear_attention" if each else "full_attention" for each in linear),
            mlp_layer_types=tuple("dense" if each else "sparse" for each in dense),
            **experts,
        )

    @classmethod
    def expert_details(cls, moe: MoEConfig, width: int) -> dict[str, Any]:
        """The settings of the experts."""
        hidden, shared = moe.expert_dim(width), moe.shared_config(width)
        if shared is not None and shared.hidden_dim(width) % hidden:
            raise Lacks(cls.kind, "shared_hidden", moe.shared_hidden, f"a multiple of the experts' {hidden}")
        return {
            "moe_intermediate_size": hidden,
            "num_experts": moe.n_experts,
            "num_experts_per_token": moe.n_activated,
            "num_shared_experts": shared.hidden_dim(width) // hidden if shared else 0,
            "num_expert_group": moe.groups,
            "topk_group": moe.groups_used,
            "moe_renormalize": moe.normalise,
            "routed_scaling_factor": moe.scale,
        }

    def mixer_rules(self, kind: str, ours: str, theirs: str) -> Iterator[Rule]:
        """The weights of one mixer."""
        rules = self.mla_rules if kind.startswith("full_attention") else self.kda_rules
        return rules(ours, f"{theirs}.self_attn")

    def mla_rules(self, ours: str, theirs: str) -> Iterator[Rule]:
        """The weights of `mla`."""
        return latent_rules(ours, theirs, self.q_lora_rank)

    def kda_rules(self, ours: str, theirs: str) -> Iterator[Rule]:
        """The weights of `kda`."""
        head, heads = self.linear_head_dim, self.linear_num_heads
        sizes = dict.fromkeys(("q", "k", "v"), head * heads)
        yield rows(
            f"{ours}.qkvz_proj.weight", {f"{theirs}.{x}_proj.weight": n for x, n in {**sizes, "g_a": head}.items()}
        )
        yield rows(f"{ours}.ba_proj.weight", {f"{theirs}.b_proj.weight": heads, f"{theirs}.f_a_proj.weight": head})
        yield from delta_rules(ours, theirs, sizes, self.linear_conv_kernel_dim)
        yield reshaped(f"{ours}.A_log", f"{theirs}.A_log", own=(heads,), their=(1, 1, heads, 1))
        same_as = {"dt_bias": "dt_bias", "norm_weight": "o_norm.weight", "o_proj.weight": "o_proj.weight"}
        for own, their in {
            **same_as,
            "expand_a.weight": "f_b_proj.weight",
            "expand_z.weight": "g_b_proj.weight",
        }.items():
            yield same(f"{ours}.{own}", f"{theirs}.{their}")

    def ffn_rules(self, kind: str, ours: str, theirs: str) -> Iterator[Rule]:
        """The weights of a dense FFN or of router, experts and shared experts."""
        if kind.endswith(" dense"):
            yield from swiglu_rules(ours, f"{theirs}.mlp", self.intermediate_size)
            return
        theirs = f"{theirs}.block_sparse_moe"
        yield same(f"{ours}.router.weight", f"{theirs}.gate.weight")
        yield same(f"{ours}.router.bias", f"{theirs}.gate.e_score_correction_bias")
        yield from expert_rules(f"{ours}.experts", f"{theirs}.experts", self.num_experts, ("w1", "w3", "w2"))
        if self.num_shared_experts:
            hidden = self.num_shared_experts * self.moe_intermediate_size
            yield from swiglu_rules(f"{ours}.shared", f"{theirs}.shared_experts", hidden)
