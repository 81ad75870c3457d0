"""Llama, Mistral, Ministral, Qwen3 and OLMo 2: `mha` and `swa`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from swamla.interop.architectures.llama import LlamaLike
from swamla.interop.gguf.home import StackHome, neighbours, rope_settings
from swamla.model.rope import Llama3Scaling

NO_SINK = -1e30  # the logit of a sink that takes nothing: its exponential is 0


@dataclass(frozen=True, kw_only=True)
class LlamaHome(StackHome):
    """Llama. It rotates neighbouring elements of queries and keys, transformers halves."""

    name: ClassVar[str] = "llama"
    names: ClassVar[str] = "LLAMA"
    theirs: LlamaLike

    def settings(self) -> dict[str, Any]:
        """With heads and positions."""
        theirs = self.theirs
        return {
            **super().settings(),
            "attention.head_count": theirs.num_attention_heads,
            "attention.head_count_kv": theirs.kv_heads,
            "attention.key_length": theirs.head_width,
            "attention.value_length": theirs.head_width,
            **rope_settings(theirs.rope_parameters, theirs.head_width),
        }

    def tensors(self, stored: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """With what Llama 3 divides each frequency by."""
        yield from super().tensors(stored)
        rope = self.theirs.rope
        if rope is not None and isinstance(rope.scaling, Llama3Scaling):
            half = self.theirs.head_width // 2
            plain = rope.base ** -(torch.arange(half) / half)
            yield "rope_freqs.weight", plain / rope.scaling.frequencies(plain, rope.base)

    def convert(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Queries and keys in llama.cpp's order."""
        turned = ".q_proj." in name or ".k_proj." in name
        yield name, neighbours(tensor, self.theirs.head_width) if turned else tensor


@dataclass(frozen=True, kw_only=True)
class Qwen3Home(LlamaHome):
    """Qwen3, which rotates halves in llama.cpp too."""

    name: ClassVar[str] = "qwen3"
    names: ClassVar[str] = "QWEN3"

    def check(self) -> None:
        """Positions are not stretched as in Llama 3."""
        super().check()
        self.without_llama_3(self.theirs.rope_parameters)

    def convert(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensor as it is."""
        yield name, tensor


@dataclass(frozen=True, kw_only=True)
class Olmo2Home(Qwen3Home):
    """OLMo 2, which has the order of Qwen3."""

    name: ClassVar[str] = "olmo2"
    names: ClassVar[str] = "OLMO2"
    has_head: ClassVar[bool] = True

    def check(self) -> None:
        """Heads divide the width."""
        super().check()
        theirs = self.theirs
        if theirs.head_width * theirs.num_attention_heads != theirs.hidden_size:
            raise self.lacks("mha.head_dim", theirs.head_width, "the width / `n_heads`")


@dataclass(frozen=True, kw_only=True)
class WindowHome(LlamaHome):
    """Granite with sliding windows: Mistral's and Ministral's layers, and a sink in each, which takes nothing."""

    name: ClassVar[str] = "granite_swa"

    def check(self) -> None:
        """A layer has a window."""
        if "sliding_attention" not in self.theirs.layer_kinds:
            raise self.lacks("mixer.kind", "mha", "swa in one layer at least; llama has such a model")

    def settings(self) -> dict[str, Any]:
        """With the window, and which layers have it. Granite's multipliers are 1."""
        local = [kind == "sliding_attention" for kind in self.theirs.layer_kinds]
        return {
            **super().settings(),
            "attention.sliding_window": self.theirs.window,
            "attention.sliding_window_pattern": local,
            "logit_scale": 1.0,
        }

    def tensors(self, stored: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """With the sinks."""
        yield from super().tensors(stored)
        for layer in range(self.theirs.num_hidden_layers):
            yield f"blk.{layer}.attn_sinks.weight", torch.full((self.theirs.num_attention_heads,), NO_SINK)
