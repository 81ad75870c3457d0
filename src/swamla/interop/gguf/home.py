"""What an architecture of llama.cpp is to us: its settings, and its tensors made of those of transformers."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from swamla.interop.architecture import Architecture
from swamla.interop.equality import Lacks
from swamla.interop.rope import RopeParameters
from swamla.interop.stack import Stack

LENGTH_EPS = 1e-6  # added to the squared length of a query or key of a delta rule
EXPERT = re.compile(r"(.*\.experts)\.\d+\.(\w+)\.weight")


@dataclass(frozen=True, kw_only=True)
class Home(ABC):
    """An architecture of llama.cpp, made of the equal one of transformers.

    name: in llama.cpp.  names: the member of `gguf.MODEL_ARCH` whose names of tensors it has.
    has_head: whether it needs a head of its own even if ours is tied.
    theirs: the equal architecture of transformers.
    """

    name: ClassVar[str]
    names: ClassVar[str]
    has_head: ClassVar[bool] = False
    theirs: Architecture

    def check(self) -> None:  # noqa: B027 (most have everything)
        """Raise `Lacks` for what llama.cpp does not have of the architecture."""

    def differences(self) -> Iterator[str]:
        """What llama.cpp computes a little differently, to be warned of."""
        return iter(())

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The metadata, without the architecture's name before each key."""

    def convert(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """One tensor of transformers as those that llama.cpp reads, still under names like those of transformers."""
        yield name, tensor

    def tensors(self, stored: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """All of them, one after the other; the matrices of a layer's experts as one. stored: as transformers has them.

        Yielded names are those that `gguf.get_tensor_name_map` knows, or llama.cpp's own.
        """
        experts: dict[str, list[Tensor]] = {}
        for name, tensor in stored.items():
            if expert := EXPERT.fullmatch(name):
                experts.setdefault(f"{expert[1]}.{expert[2]}.weight", []).append(tensor)
            else:
                yield from self.convert(name, tensor)
        for name, matrices in experts.items():
            yield name, torch.stack(matrices)
        if self.has_head and "lm_head.weight" not in stored:
            yield "lm_head.weight", stored["model.embed_tokens.weight"]

    def without_llama_3(self, rope: RopeParameters) -> None:
        """Raise `Lacks` if positions are stretched as in Llama 3."""
        if rope.rope_type == "llama3":
            raise self.lacks("rope.scaling.kind", "llama3", "none, linear or yarn")

    def lacks(self, field: str, got: Any, wanted: str) -> Lacks:
        """The error for a setting that llama.cpp does not have."""
        return Lacks(f"{self.name} of llama.cpp", field, got, wanted)


@dataclass(frozen=True, kw_only=True)
class StackHome(Home):
    """One with RMSNorm and SwiGLU."""

    theirs: Stack

    def settings(self) -> dict[str, Any]:
        """The sizes."""
        return {
            "embedding_length": self.theirs.hidden_size,
            "block_count": self.theirs.num_hidden_layers,
            "feed_forward_length": self.theirs.intermediate_size,
            "attention.layer_norm_rms_epsilon": self.theirs.rms_norm_eps,
        }


def lengths_differ(eps: float) -> Iterator[str]:
    """The warning of a delta rule's layers, whose norms of queries and keys have the ε of all norms in llama.cpp."""
    if eps != LENGTH_EPS:
        yield f"llama.cpp makes queries and keys unit vectors with norm.eps = {eps:g}, where it is 1e-6 here"


def rope_settings(rope: RopeParameters, width: int) -> dict[str, Any]:
    """The metadata of rotary positions; those of Llama 3 are a tensor. width: elements of a head that are rotated."""
    found: dict[str, Any] = {"rope.dimension_count": width, "rope.freq_base": rope.rope_theta}
    if rope.rope_type in ("default", "llama3"):
        return found
    factor = rope.factor or 1.0
    found |= {"rope.scaling.type": rope.rope_type, "rope.scaling.factor": factor}
    if rope.rope_type == "yarn":
        found |= {
            "rope.scaling.original_context_length": rope.original_max_position_embeddings,
            "rope.scaling.yarn_beta_fast": rope.beta_fast,
            "rope.scaling.yarn_beta_slow": rope.beta_slow,
        }
        # llama.cpp multiplies by what YaRN recommends; ours is a setting.
        if rope.attention_factor is not None:
            found["rope.scaling.attn_factor"] = rope.attention_factor / recommended(factor)
    return found


def recommended(factor: float, mscale: float = 1.0) -> float:
    """By what YaRN (arXiv 2309.00071, equation 22) recommends to multiply positions stretched by `factor`."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def neighbours(tensor: Tensor, width: int) -> Tensor:
    """Rows of heads of `width` whose halves are rotated together, in the order where neighbours are."""
    return tensor.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)
