"""What every sequence mixer offers: its config, counts included, its module, and the state it keeps between steps."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from swamla.ops.attention import cached_attention, causal_attention
from swamla.ops.attention.trial import AttentionTrial
from swamla.ops.layout import PADDING, Layout
from swamla.registry import Registered


@dataclass(frozen=True, kw_only=True)
class MixerConfig(Registered, home="swamla.model.mixers"):
    """The mixer contract: what a config has to offer, and below it what it may.

    sign, style: the letter that stands for it in drawings, and rich's style of that letter.
    is_local: whether cost and state stay the same however far the document's start is.
    outputs: the module's parameters that write to the residual stream, which start smaller the deeper the model.
    vectors: those with two dimensions that map no activations but are vectors side by side, as the filters of a
        convolution are: Muon leaves them to AdamW, and a layer with such a weight does not multiply in fp8.
    """

    sign: ClassVar[str] = "?"
    style: ClassVar[str] = "reverse"
    is_local: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("o_proj.weight",)
    vectors: ClassVar[tuple[str, ...]] = ()

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

    @property
    def sees_order(self) -> bool:
        """Whether its output depends on the order of earlier tokens, where embeddings say nothing of positions."""
        return True

    def backends(self, device: torch.device, width: int, dtype: torch.dtype) -> dict[str, str]:
        """What computes which op on `device`, empty for none with a choice; `MissingBackendError` for what cannot."""
        return {}

    def with_backend(self, backend: str) -> Self:
        """The same mixer computed by `backend`, where the config leaves the choice open ("auto")."""
        return self

    def trial(self, width: int) -> AttentionTrial | None:
        """What to race on a CPU where the backend is left open; None where there is no choice."""
        return None

    def prepare(self, seq: Layout, width: int) -> None:
        """Make masks and tables eagerly, so that the compiled forward has no graph break."""
        return

    def kept_weights(self, width: int, length: int, *, bf16: bool) -> float:
        """Attention weights that a token of a document keeps for the backward pass on a CPU, of all heads."""
        return 0.0


@dataclass
class State:
    """Tensors that a mixer preallocates and updates in place, one row per sequence."""

    @property
    def nbytes(self) -> int:
        """Bytes held, exactly what `accounting.state_bytes` predicts."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """The live tensors."""
        return [getattr(self, field.name) for field in fields(self)]


S = TypeVar("S", bound=State)


class Mixer(nn.Module, ABC, Generic[S]):
    """Mixes information along time. `step` on a prompt split in any way equals `forward` on the whole."""

    @abstractmethod
    def forward(self, x_BTD: Tensor, seq: Layout) -> Tensor:
        """Mix whole sequences, from the start of each document: (B, T, D) → (B, T, D)."""

    @abstractmethod
    def init_state(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str) -> S:
        """The state of `batch` sequences of which nothing has been seen, to grow to at most `max_len` tokens."""

    @abstractmethod
    def step(self, x_BTD: Tensor, state: S, seq: Layout) -> Tensor:
        """Mix T >= 1 new tokens after those in `state`, which is updated: (B, T, D) → (B, T, D).

        `seq` is `Layout.continuing(...)`: padding (document -1) stands only at row ends and leaves no trace.
        """


def without_padding(x_BTD: Tensor, seq: Layout) -> Tensor:
    """x with zeros for padding, which may hold anything: in a state a NaN would pass every weight of zero."""
    return x_BTD.where((seq.document_BT != PADDING)[..., None], 0) if seq.padded else x_BTD


def append(cache_BSX: Tensor, new_BTX: Tensor, seq: Layout) -> None:
    """Write new tokens to where a cache of all tokens keeps them, in place.

    Padding too: it lies behind a row's end, where nobody looks before it is overwritten.
    """
    if seq.held is not None:
        cache_BSX[:, seq.held : seq.end] = new_BTX
    else:
        write_at(cache_BSX, seq.position_BT, new_BTX)


def write_at(cache_BSX: Tensor, index_BT: Tensor, new_BTX: Tensor) -> None:
    """cache[b, index[b, t]] = new[b, t], in place; the indices of a row must differ."""
    row_B1 = torch.arange(cache_BSX.shape[0], device=cache_BSX.device)[:, None]
    cache_BSX[row_B1, index_BT] = new_BTX.to(cache_BSX.dtype)


def attend_to_held(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, seq: Layout, *, scale: float | None = None, backend: str
) -> Tensor:
    """(B, T, H, V): new tokens attend to the first `seq.end` tokens of a state, themselves included."""
    if seq.held == 0 and q_BTHK.shape[1] > 1 and q_BTHK.device.type != "cpu":  # where fused kernels are faster
        return causal_attention(q_BTHK, k_BSGK, v_BSGV, seq, scale=scale, backend=backend)
    return cached_attention(q_BTHK, k_BSGK, v_BSGV, causal_mask(seq), scale=scale)


def causal_mask(seq: Layout) -> Tensor | None:
    """(B, T, seq.end): which held tokens each new one may see; None where the rows are level: all but later ones."""
    return None if seq.held is not None else seq.table("causal", lambda: filled_mask(seq, seq.end))


def filled_mask(seq: Layout, size: int) -> Tensor:
    """(B, T, size): which places of a state hold a token that is not later than the new one, itself included."""
    place_S = torch.arange(size, device=seq.position_BT.device)
    return place_S <= seq.position_BT[:, :, None]


def expansion_pays_from(rank: int, made: int) -> float:
    """How many new tokens it takes until expanding all held latents costs less than to attend to the latents.

    rank: width of the latent. made: numbers of a key and a value that a head makes of it. Attending to latents costs
    2 · rank products a query and key (score and sum) instead of `made`; an expansion rank · made, once a key.
    """
    return rank * made / (2 * rank - made) if made < 2 * rank else math.inf


def absorb(x_BTHX: Tensor, weight_HXR: Tensor) -> Tensor:
    """Each head's vectors times its own matrix: (B, T, H, X) → (B, T, H, R)."""
    batch, time, heads, width = x_BTHX.shape
    x_HNX = x_BTHX.reshape(batch * time, heads, width).transpose(0, 1)
    return torch.bmm(x_HNX, weight_HXR).transpose(0, 1).view(batch, time, heads, -1)
