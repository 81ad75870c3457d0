"""Qwen3.5 and Qwen3-Next: `gdn` and gated `mha`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from swamla.interop.architectures.qwen import QwenHybrid
from swamla.interop.architectures.qwen_moe import Qwen3Next
from swamla.interop.gguf.home import StackHome, lengths_differ, rope_settings


@dataclass(frozen=True, kw_only=True)
class Qwen3_5Home(StackHome):
    """Qwen3.5. Gains are stored as they are, decay rates as −exp(A_log).

    llama.cpp gives key head i % n to value head i, transformers i // (heads / n): the value heads change places.
    """

    name: ClassVar[str] = "qwen35"
    names: ClassVar[str] = "QWEN35"
    theirs: QwenHybrid

    def check(self) -> None:
        """States are square, and there is one at least."""
        theirs = self.theirs
        self.without_llama_3(theirs.rope_parameters)
        key, value = theirs.linear_key_head_dim, theirs.linear_value_head_dim
        if key != value:
            raise self.lacks("gdn.head_v_dim", value, f"`head_k_dim`, here {key}: its states are square")

    def differences(self) -> Iterator[str]:
        """The ε of unit vectors."""
        return lengths_differ(self.theirs.rms_norm_eps)

    def settings(self) -> dict[str, Any]:
        """With both kinds of layers."""
        theirs = self.theirs
        found = {
            **super().settings(),
            "attention.head_count": theirs.num_attention_heads,
            "attention.head_count_kv": theirs.kv_heads,
            "attention.key_length": theirs.head_width,
            "attention.value_length": theirs.head_width,
            "attention.recurrent_layers": [kind == "linear_attention" for kind in theirs.layer_types],
            "ssm.conv_kernel": theirs.linear_conv_kernel_dim,
            "ssm.state_size": theirs.linear_key_head_dim,
            "ssm.group_count": theirs.linear_num_key_heads,
            "ssm.time_step_rank": theirs.linear_num_value_heads,
            "ssm.inner_size": theirs.linear_num_value_heads * theirs.linear_value_head_dim,
            **rope_settings(theirs.rope_parameters, theirs.rope_width),
        }
        return found | self.sections()

    def sections(self) -> dict[str, Any]:
        """Which frequencies turn by each of an image's three coordinates: in turn. Text has the same for all three."""
        return {
            "rope.dimension_sections": [len(range(axis, self.theirs.rope_width // 2, 3)) for axis in range(3)] + [0]
        }

    def convert(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Gains, decay rates, filters and value heads as llama.cpp has them."""
        _, _, part = name.rpartition(".linear_attn.")
        keys = 2 * self.theirs.linear_num_key_heads * self.theirs.linear_key_head_dim
        if part == "A_log":
            yield name, self.heads(-torch.exp(tensor.float()), 1)
        elif part == "dt_bias":
            yield name.replace("dt_bias", "dt_proj.bias"), self.heads(tensor, 1)
        elif part in ("in_proj_qkv.weight", "conv1d.weight"):
            matrix = tensor.flatten(1)
            yield name, torch.cat((matrix[:keys], self.heads(matrix[keys:], self.theirs.linear_value_head_dim)))
        elif part == "in_proj_z.weight":
            yield name, self.heads(tensor, self.theirs.linear_value_head_dim)
        elif part in ("in_proj_a.weight", "in_proj_b.weight"):
            yield name, self.heads(tensor, 1)
        elif part == "out_proj.weight":
            yield name, self.heads(tensor.T, self.theirs.linear_value_head_dim).T
        elif name.endswith("norm.weight") and part != "norm.weight":
            yield name, tensor.float() + 1
        else:
            yield name, tensor

    def heads(self, tensor: Tensor, width: int) -> Tensor:
        """Rows of value heads of `width`, in llama.cpp's order."""
        groups = self.theirs.linear_num_key_heads
        shared = self.theirs.linear_num_value_heads // groups
        return tensor.unflatten(0, (groups, shared, width)).transpose(0, 1).flatten(0, 2)


@dataclass(frozen=True, kw_only=True)
class Qwen3NextHome(Qwen3_5Home):
    """Qwen3-Next, in transformers' order of heads."""

    name: ClassVar[str] = "qwen3next"
    names: ClassVar[str] = "QWEN3NEXT"
    theirs: Qwen3Next

    def check(self) -> None:
        """Experts in every layer."""
        super().check()
        if any(kind.endswith(" dense") for kind in self.theirs.layer_kinds):
            raise self.lacks("ffn.kind", "dense", "moe in every layer")
        if not self.theirs.norm_topk_prob:
            raise self.lacks("moe.normalise", False, "true")

    def settings(self) -> dict[str, Any]:
        """With the experts."""
        theirs = self.theirs
        return {
            **super().settings(),
            "expert_count": theirs.num_experts,
            "expert_used_count": theirs.num_experts_per_tok,
            "expert_feed_forward_length": theirs.moe_intermediate_size,
            "expert_shared_feed_forward_length": theirs.shared_expert_intermediate_size,
        }

    def sections(self) -> dict[str, Any]:
        """None."""
        return {}

    def convert(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """With queries, keys and values of all heads apart from the gates."""
        theirs = self.theirs
        if name.endswith(".in_proj_qkvz.weight"):
            groups, key = theirs.linear_num_key_heads, theirs.linear_key_head_dim
            values = theirs.linear_num_value_heads // groups * theirs.linear_value_head_dim
            parts = tensor.unflatten(0, (groups, -1)).split([key, key, values, values], dim=1)
            queries, keys, values_of_all, gates = (part.flatten(0, 1) for part in parts)
            yield name.replace("_qkvz", "_qkv"), torch.cat((queries, keys, values_of_all))
            yield name.replace("_qkvz", "_z"), gates
        elif name.endswith(".shared_expert_gate.weight"):
            yield name, tensor.flatten()
        else:
            yield from super().convert(name, tensor)

    def heads(self, tensor: Tensor, width: int) -> Tensor:
        """The order of transformers."""
        return tensor
