"""What every sequence mixer offers, and the state it keeps between steps."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from swamla.ops.layout import Layout


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


def write_at(cache_BSX: Tensor, index_BT: Tensor, new_BTX: Tensor) -> None:
    """cache[b, index[b, t]] = new[b, t], in place; the indices of a row must differ."""
    row_B1 = torch.arange(cache_BSX.shape[0], device=cache_BSX.device)[:, None]
    cache_BSX[row_B1, index_BT] = new_BTX.to(cache_BSX.dtype)
