"""The mixer contract: a config with exact counts, a module, and its decoding state."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from swamla.errors import UsageError
from swamla.model.mixers.explanation import Explanation
from swamla.ops.attention import cached_attention, causal_attention
from swamla.ops.attention.trial import AttentionTrial
from swamla.ops.layout import PADDING, Layout
from swamla.registry import Registered


@dataclass(frozen=True, kw_only=True)
class MixerConfig(Registered, home="swamla.model.mixers"):
    """The contract of a mixer's config: abstract methods are required, the others have defaults.

    sign, style: the letter that stands for the mixer in drawings, and that letter's rich style.
    is_local: whether a token's cost and the state do not grow with the distance to the document's start.
    outputs: the module's parameters that write to the residual stream; their initial weights are scaled by depth.
    ranks: fields that may not exceed the model's width, which scale with it if a flag makes the model narrower.
    head_counts: fields that count heads: a wider model of the same shape has more of them, not larger ones.
    vectors: two-dimensional parameters that are a set of vectors and not the matrix of a linear map, such as the
        filters of a convolution. Muon leaves them to AdamW, and their layer is not converted to fp8.
    only_projects: whether the module does nothing with its input but multiply it by matrices. Autocast rounds it for
        these products, so the block may round it before.
    BACKENDS: what the field `backend` may be, "auto" included; empty for a mixer without that field.
    """

    sign: ClassVar[str] = "?"
    style: ClassVar[str] = "reverse"
    is_local: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("o_proj.weight",)
    ranks: ClassVar[tuple[str, ...]] = ()
    head_counts: ClassVar[tuple[str, ...]] = ("n_heads",)
    vectors: ClassVar[tuple[str, ...]] = ()
    only_projects: ClassVar[bool] = False
    BACKENDS: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def build(self, width: int) -> "Mixer":
        """The module, for a model of `width`."""

    @abstractmethod
    def n_parameters(self, width: int) -> int:
        """Parameters of the module. Raises `ConfigError` for settings that do not fit the width."""

    @abstractmethod
    def forward_flops(self, width: int, length: int) -> int:
        """Floating-point operations, of matrix products, of a forward pass over one document of `length` tokens."""

    @abstractmethod
    def state_bytes(self, width: int, length: int, element_bytes: int) -> int:
        """Bytes of the state of one sequence that may grow to `length` tokens, `element_bytes` a number."""

    @classmethod
    def fitting(cls, width: int, n_heads: int) -> dict[str, Any]:
        """Settings of a mixer that a flag adds to a model of `width`, for fields whose defaults would not suit it."""
        return {}

    def projections(self, width: int) -> Mapping[str, Mapping[str, int]]:
        """The logical projections that a matrix of the module fuses, in order: parameter → name → outputs.

        Low-rank adapters are apart for each; a matrix that is not named here is one projection.
        """
        return {}

    def state_settings(self, width: int) -> dict[str, int]:
        """Settings by which the state's bytes can be chosen, with their values in a model of `width`; may be empty."""
        return {}

    @property
    def sees_order(self) -> bool:
        """Whether the output depends on the order of earlier tokens without positions in the embeddings."""
        return True

    @property
    def explained_heads(self) -> int:
        """Heads of the mixer's `Explanation`, by which its memory is bounded; 1 where it has none."""
        return 1

    def backends(self, device: torch.device, width: int, dtype: torch.dtype) -> dict[str, str]:
        """Op → backend on `device` in a model of `width` that computes in `dtype`; may be empty.

        Raises `MissingBackendError` for a configured backend that cannot compute the op there.
        """
        return {}

    def with_backend(self, backend: str) -> Self:
        """The same mixer with this backend if its own is "auto"; itself if it has no choice of backends."""
        chosen: dict[str, Any] = {"backend": backend}
        return replace(self, **chosen) if self.BACKENDS and self.__dict__["backend"] == "auto" else self

    def trial(self, width: int) -> AttentionTrial | None:
        """The attention whose backends are timed on a CPU when the backend is "auto"; None if there is no choice."""
        return None

    def prepare(self, seq: Layout, width: int) -> None:
        """Build masks and tables eagerly, so that the compiled forward has no graph break."""
        return

    def kept_weights(self, width: int, length: int, *, bf16: bool) -> float:
        """Attention weights per token, over all heads, that are saved for the backward pass on a CPU."""
        return 0.0


@dataclass
class State:
    """Tensors that a mixer preallocates and updates in place, one row per sequence, which is the first dimension.

    A state that is made for more tokens has the same values at the same indices, and room after them.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, equal to `accounting.state_bytes`."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """The live tensors."""
        return [getattr(self, field.name) for field in fields(self)]

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A state of what `function` makes of every tensor, also of those of a state within it."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        made = {name: part.map(function) if isinstance(part, State) else function(part) for name, part in parts.items()}
        return type(self)(**made)

    def grow(self, larger: Self) -> None:
        """Take the shapes of a state for more tokens, whose tensors are not read and may be on the meta device."""
        for name in (field.name for field in fields(self)):
            old, room = getattr(self, name), getattr(larger, name)
            if isinstance(old, State):
                old.grow(room)
            elif old.shape != room.shape:
                new = old.new_zeros(room.shape)
                new[tuple(map(slice, old.shape))] = old
                setattr(self, name, new)


S = TypeVar("S", bound=State)


class Mixer(nn.Module, ABC, Generic[S]):
    """Mixes information along time. `step` over any split of a prompt equals `forward` on the whole prompt."""

    @abstractmethod
    def forward(self, x_BTD: Tensor, seq: Layout) -> Tensor:
        """Mix whole sequences, from the start of each document: (B, T, D) → (B, T, D)."""

    def scale_from(self, base_width: int) -> None:
        """µP: divide scores by the heads' width instead of its root, equal to the root at `base_width`.

        Nothing is to be done where no product of two vectors grows with the width.
        """
        return

    def explain(self, x_BTD: Tensor, seq: Layout) -> Explanation:
        """The output of `forward` taken apart by head and by source token; O(T²), for rows of any documents.

        Of a mixer that has no such sum raises `UsageError`.
        """
        raise UsageError(f"{type(self).__name__} has no `explain`: its output is no sum over earlier tokens")

    def taps(self) -> dict[str, Tensor]:
        """Filters of the mixer's own convolutions by what they filter: (channels, W), of x_t first, then x_{t-1}, …"""
        return {}

    @abstractmethod
    def init_state(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str) -> S:
        """The empty state of `batch` sequences that may grow to `max_len` tokens."""

    @abstractmethod
    def step(self, x_BTD: Tensor, state: S, seq: Layout) -> Tensor:
        """Mix T >= 1 new tokens after those in `state`, which is updated: (B, T, D) → (B, T, D).

        seq: from `Layout.continuing(...)`; padding (document -1) is at row ends only and does not change the state.
        """


def without_padding(x_BTD: Tensor, seq: Layout) -> Tensor:
    """x with zeros for padding, whose NaN would otherwise enter the state."""
    return x_BTD.where((seq.document_BT != PADDING)[..., None], 0) if seq.padded else x_BTD


def append(cache_BSX: Tensor, new_BTX: Tensor, seq: Layout) -> None:
    """Write new tokens to their positions in a cache of all tokens, in place.

    Padding is written after a row's end, where it is masked until it is overwritten.
    """
    if seq.past is not None:
        cache_BSX[:, seq.past : seq.end] = new_BTX
    else:
        write_at(cache_BSX, seq.position_BT, new_BTX)


def write_at(cache_BSX: Tensor, index_BT: Tensor, new_BTX: Tensor) -> None:
    """cache[b, index[b, t]] = new[b, t], in place; the indices of a row must differ."""
    row_B1 = torch.arange(cache_BSX.shape[0], device=cache_BSX.device)[:, None]
    cache_BSX[row_B1, index_BT] = new_BTX.to(cache_BSX.dtype)


def cached_causal_attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    seq: Layout,
    *,
    scale: float | None = None,
    sink_logit_H: Tensor | None = None,
    backend: str,
) -> Tensor:
    """o (B, T, H, V): new tokens attend to the first `seq.end` tokens of a cache, their own included."""
    faster = q_BTHK.device.type != "cpu" or sink_logit_H is not None  # fused kernels, tiles: for a prompt
    if seq.past == 0 and q_BTHK.shape[1] > 1 and faster:
        return causal_attention(q_BTHK, k_BSGK, v_BSGV, seq, scale=scale, sink_logit_H=sink_logit_H, backend=backend)
    return cached_attention(q_BTHK, k_BSGK, v_BSGV, causal_mask(seq), scale=scale, sink_logit_H=sink_logit_H)


def causal_mask(seq: Layout) -> Tensor | None:
    """(B, T, seq.end): which cached tokens each new token attends to; None (causal) for rows of uniform length."""
    return None if seq.past is not None else seq.table("causal", lambda: filled_mask(seq, seq.end))


def filled_mask(seq: Layout, size: int) -> Tensor:
    """(B, T, size): which slots of a cache have a token up to the new one, itself included."""
    slot_S = torch.arange(size, device=seq.position_BT.device)
    return slot_S <= seq.position_BT[:, :, None]


def min_tokens_to_expand(rank: int, expanded: int) -> float:
    """The number of new tokens from which expanding all cached latents is cheaper than attending to the latents.

    rank: width of the latent.  expanded: width of a head's key plus value. Attending to latents costs 2 · rank
    multiplications per query and key (score and weighted sum) instead of `expanded`; the expansion costs
    rank · expanded once per key.
    """
    return rank * expanded / (2 * rank - expanded) if expanded < 2 * rank else math.inf


def absorb(x_BTHX: Tensor, weight_HXR: Tensor) -> Tensor:
    """Multiply each head's vectors by its own matrix: (B, T, H, X) → (B, T, H, R)."""
    batch, time, heads, width = x_BTHX.shape
    x_HNX = x_BTHX.reshape(batch * time, heads, width).transpose(0, 1)
    return torch.bmm(x_HNX, weight_HXR).transpose(0, 1).view(batch, time, heads, -1)
