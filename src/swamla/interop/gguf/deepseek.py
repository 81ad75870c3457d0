"""DeepSeek-V2 and V3: `mla`, dense FFNs and experts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from swamla.interop.architectures.deepseek import DeepseekV2, LatentStack
from swamla.interop.architectures.kimi import KimiLinear
from swamla.interop.gguf.home import StackHome, neighbours, recommended, rope_settings

LATENT_EPS = 1e-6  # of the norms of latents in transformers, whatever the other norms have
FULL_RANK = (26, 27)  # numbers of layers by which llama.cpp knows that a model's queries have full rank
SOFTMAX, SIGMOID = 1, 2


def latent_settings(theirs: LatentStack | KimiLinear) -> dict[str, Any]:
    """The metadata of `mla` in the form that caches latents: one head of keys and values, which are the latents."""
    found: dict[str, Any] = {
        "attention.head_count": theirs.num_attention_heads,
        "attention.kv_lora_rank": theirs.kv_lora_rank,
        "attention.key_length": theirs.kv_lora_rank + theirs.qk_rope_head_dim,
        "attention.value_length": theirs.kv_lora_rank,
        "attention.key_length_mla": theirs.qk_nope_head_dim + theirs.qk_rope_head_dim,
        "attention.value_length_mla": theirs.v_head_dim,
    }
    return found | ({"attention.q_lora_rank": theirs.q_lora_rank} if theirs.q_lora_rank else {})


def latent_tensors(theirs: LatentStack | KimiLinear, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One tensor of `mla`: keys and values apart, and latents that the norm's epsilon of llama.cpp does not change."""
    if name.endswith(".kv_b_proj.weight"):
        keys, values = tensor.unflatten(0, (theirs.num_attention_heads, -1)).split(
            [theirs.qk_nope_head_dim, theirs.v_head_dim], dim=1
        )
        yield name.replace("kv_b", "k_b"), keys.mT
        yield name.replace("kv_b", "v_b"), values
        return
    # x / √(mean x² + 1e-6) = s·x / √(mean (s·x)² + ε) for s² = ε / 1e-6.
    scale = (theirs.rms_norm_eps / LATENT_EPS) ** 0.5
    if name.endswith(".q_a_proj.weight"):
        yield name, tensor * scale
    elif name.endswith(".kv_a_proj_with_mqa.weight"):
        latents, keys = tensor.split([theirs.kv_lora_rank, theirs.qk_rope_head_dim])
        yield name, torch.cat((latents * scale, keys))
    else:
        yield name, tensor


@dataclass(frozen=True, kw_only=True)
class DeepseekHome(StackHome):
    """DeepSeek-V2 and V3."""

    name: ClassVar[str] = "deepseek2"
    names: ClassVar[str] = "DEEPSEEK2"
    has_head: ClassVar[bool] = True
    theirs: LatentStack

    def check(self) -> None:
        """Low-rank queries but in models of two sizes, and groups of experts by the sum of their two best."""
        theirs = self.theirs
        self.without_llama_3(theirs.rope_parameters)
        lite = theirs.num_hidden_layers in FULL_RANK
        if lite == bool(theirs.q_lora_rank):
            wanted = f"{'0' if lite else '> 0'} in a model of {theirs.num_hidden_layers} layers"
            raise self.lacks("mla.q_lora_rank", theirs.q_lora_rank or 0, wanted)
        if self.sparse and self.groups > 1 and isinstance(theirs, DeepseekV2):
            raise self.lacks("moe.group_score", "max", "top2, or groups = 1")

    @property
    def sparse(self) -> bool:
        """Whether a layer has experts."""
        return self.theirs.first_k_dense_replace < self.theirs.num_hidden_layers

    @property
    def groups(self) -> int:
        """Groups of experts."""
        limited = not isinstance(self.theirs, DeepseekV2) or self.theirs.topk_method == "group_limited_greedy"
        return (limited and self.theirs.n_group) or 1

    def settings(self) -> dict[str, Any]:
        """With latents, positions and experts."""
        theirs, rope = self.theirs, self.theirs.rope_parameters
        found = {
            **super().settings(),
            **latent_settings(theirs),
            "attention.head_count_kv": 1,
            **rope_settings(rope, theirs.qk_rope_head_dim),
            "leading_dense_block_count": theirs.first_k_dense_replace,
            "expert_feed_forward_length": theirs.moe_intermediate_size,
            "expert_shared_count": max(theirs.n_shared_experts, 1),
            "expert_weights_norm": theirs.norm_topk_prob,
            "expert_weights_scale": theirs.routed_scaling_factor,
            "expert_gating_func": SOFTMAX if isinstance(theirs, DeepseekV2) else SIGMOID,
        }
        found.pop("rope.scaling.attn_factor", None)  # `convert` multiplies the weights
        if rope.mscale_all_dim:
            found["rope.scaling.yarn_log_multiplier"] = 0.1 * rope.mscale_all_dim
        if self.sparse:
            found |= {"expert_count": theirs.n_routed_experts, "expert_used_count": theirs.num_experts_per_tok}
        if self.sparse and self.groups > 1:
            found |= {"expert_group_count": self.groups, "expert_group_used_count": theirs.topk_group}
        return found

    def convert(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Queries and keys in llama.cpp's order and scale; the bias that balances experts under the name it has there.

        llama.cpp multiplies positions and scores by what it makes of mscale_all_dim alone: what is missing goes into
        the weights.
        """
        theirs, rope = self.theirs, self.theirs.rope_parameters
        turned, scores = 1.0, 1.0
        if rope.rope_type == "yarn":
            factor, all_dim = rope.factor or 1.0, rope.mscale_all_dim or 0.0
            wanted = 1.0 if rope.attention_factor is None else rope.attention_factor
            turned = wanted if all_dim else wanted / recommended(factor)
            scores = 1.0 if all_dim else recommended(factor) ** -2
        head = [theirs.qk_nope_head_dim, theirs.qk_rope_head_dim]
        for found, part in latent_tensors(theirs, name, tensor):
            if found.endswith((".q_proj.weight", ".q_b_proj.weight")):
                plain, rotated = part.unflatten(0, (-1, sum(head))).split(head, dim=1)
                rotated = self.ordered(rotated.flatten(0, 1)).unflatten(0, (-1, head[1]))
                yield found, scores * torch.cat((plain, turned * rotated), dim=1).flatten(0, 1)
            elif found.endswith(".kv_a_proj_with_mqa.weight"):
                latents, rotated = part.split([theirs.kv_lora_rank, head[1]])
                yield found, torch.cat((latents, turned * self.ordered(rotated)))
            else:
                yield found.replace("e_score_correction_bias", "e_score_correction.bias"), part

    def ordered(self, rows: Tensor) -> Tensor:
        """Rows of elements that are rotated, so that neighbours are rotated together."""
        return rows if self.theirs.interleaved else neighbours(rows, self.theirs.qk_rope_head_dim)

    def tensors(self, stored: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """With a shared expert of zeros if there is none."""
        yield from super().tensors(stored)
        if self.theirs.n_shared_experts == 0:
            yield from empty_experts(
                self.theirs, "mlp", range(self.theirs.first_k_dense_replace, self.theirs.num_hidden_layers)
            )


def empty_experts(theirs: LatentStack | KimiLinear, ffn: str, layers: range) -> Iterator[tuple[str, Tensor]]:
    """A shared expert that adds nothing, for an architecture that has one in every layer with experts."""
    for layer in layers:
        for part in ("gate", "up"):
            zeros = torch.zeros(theirs.moe_intermediate_size, theirs.hidden_size)
            yield f"model.layers.{layer}.{ffn}.shared_experts.{part}_proj.weight", zeros
        yield f"model.layers.{layer}.{ffn}.shared_experts.down_proj.weight", zeros.T
