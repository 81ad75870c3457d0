"""GPT-2: `mha` with learned positions, LayerNorm, GELU and biases."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from swamla.interop.architectures.gpt2 import GPT2
from swamla.interop.gguf.home import Home


@dataclass(frozen=True, kw_only=True)
class GPT2Home(Home):
    """GPT-2."""

    name: ClassVar[str] = "gpt2"
    names: ClassVar[str] = "GPT2"
    theirs: GPT2

    def settings(self) -> dict[str, Any]:
        """The sizes; the context is that of the positions."""
        theirs = self.theirs
        return {
            "context_length": theirs.n_positions,
            "embedding_length": theirs.n_embd,
            "block_count": theirs.n_layer,
            "feed_forward_length": theirs.n_inner or 4 * theirs.n_embd,
            "attention.head_count": theirs.n_head,
            "attention.layer_norm_epsilon": theirs.layer_norm_epsilon,
        }

    def convert(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Matrices, which transformers stores transposed."""
        matrix = tensor.ndim == 2 and ".h." in name
        yield name, tensor.T if matrix else tensor
