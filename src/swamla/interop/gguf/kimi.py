"""Kimi Linear: `kda` and `mla` without positions."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from swamla.interop.architectures.kimi import KimiLinear
from swamla.interop.gguf.deepseek import SIGMOID, empty_experts, latent_settings, latent_tensors
from swamla.interop.gguf.home import StackHome, lengths_differ


@dataclass(frozen=True, kw_only=True)
class KimiHome(StackHome):
    """Kimi Linear."""

    name: ClassVar[str] = "kimi-linear"
    names: ClassVar[str] = "KIMI_LINEAR"
    has_head: ClassVar[bool] = True
    theirs: KimiLinear

    @property
    def dense(self) -> int:
        """Layers before the first with experts."""
        kinds = self.theirs.mlp_layer_types
        return kinds.index("sparse") if "sparse" in kinds else len(kinds)

    def check(self) -> None:
        """All mixers have the same number of heads, dense FFNs come first, and experts' weights are normalised."""
        theirs = self.theirs
        if theirs.linear_num_heads != theirs.num_attention_heads:
            raise self.lacks("kda.n_heads", theirs.linear_num_heads, f"mla's, here {theirs.num_attention_heads}")
        if "dense" in theirs.mlp_layer_types[self.dense :]:
            raise self.lacks("ffn.kind", "dense", "moe in every layer after the first with experts")
        if theirs.q_lora_rank:
            raise self.lacks("mla.q_lora_rank", theirs.q_lora_rank, "0")
        if self.dense < theirs.num_hidden_layers and not theirs.moe_renormalize:
            raise self.lacks("moe.normalise", False, "true")

    def differences(self) -> Iterator[str]:
        """The ε of unit vectors."""
        return lengths_differ(self.theirs.rms_norm_eps)

    def settings(self) -> dict[str, Any]:
        """With both kinds of layers, and experts. A layer without heads of keys and values is `kda`."""
        theirs = self.theirs
        found = {
            **super().settings(),
            **latent_settings(theirs),
            "attention.head_count_kv": [int(kind == "full_attention") for kind in theirs.layer_types],
            "rope.dimension_count": theirs.qk_rope_head_dim,
            "ssm.conv_kernel": theirs.linear_conv_kernel_dim,
            "kda.head_dim": theirs.linear_head_dim,
            "leading_dense_block_count": self.dense,
            "expert_feed_forward_length": theirs.moe_intermediate_size,
            "expert_shared_count": max(theirs.num_shared_experts, 1),
            "expert_weights_scale": theirs.routed_scaling_factor,
            "expert_gating_func": SIGMOID,
        }
        if self.dense < theirs.num_hidden_layers:
            found |= {"expert_count": theirs.num_experts, "expert_used_count": theirs.num_experts_per_token}
            if theirs.num_expert_group > 1:
                found |= {"expert_group_count": theirs.num_expert_group, "expert_group_used_count": theirs.topk_group}
        return found

    def convert(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Filters and decay rates in llama.cpp's shapes."""
        if name.endswith("_conv1d.weight"):
            yield name, tensor.reshape(1, -1, 1, self.theirs.linear_conv_kernel_dim)
        elif name.endswith(".A_log"):
            yield name, -torch.exp(tensor.float())
        elif name.endswith(".dt_bias"):
            yield name.replace("dt_bias", "dt_proj.bias"), tensor
        else:
            for found, part in latent_tensors(self.theirs, name, tensor):
                yield found.replace("e_score_correction_bias", "e_score_correction.bias"), part

    def tensors(self, stored: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """With a shared expert of zeros if there is none."""
        yield from super().tensors(stored)
        if self.theirs.num_shared_experts == 0:
            yield from empty_experts(self.theirs, "block_sparse_moe", range(self.dense, self.theirs.num_hidden_layers))
