"""The way of tokens to their experts and back."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Dispatch:
    """Which row goes to which expert: N tokens, each to K of E experts, as N·K rows sorted by expert.

    Every row moves by a gather, forward and backward, so that sums have one order on every device. Of equal experts
    the earlier token comes first.

    surplus: an expert may be the number `n_experts`, which is none: those rows come last, and beyond `ends_E`.
    """

    def __init__(self, expert_NK: Tensor, n_experts: int, *, surplus: bool = False) -> None:
        self.shape, self.surplus = expert_NK.shape, surplus
        flat = expert_NK.flatten()
        sorted_expert, self.order = flat.sort(stable=True)
        self.place = torch.empty_like(self.order)
        self.place[self.order] = torch.arange(flat.numel(), device=flat.device)
        every_expert = torch.arange(n_experts, device=flat.device)
        self.ends_E = torch.searchsorted(sorted_expert, every_expert, right=True, out_int32=True)

    @property
    def load_E(self) -> Tensor:
        """Tokens of each expert, int64."""
        return self.ends_E.long().diff(prepend=self.ends_E.new_zeros(1, dtype=torch.int64))

    def scatter(self, x_ND: Tensor) -> Tensor:
        """(N, D) → (N·K, D): each token once for every expert that it goes to, sorted by expert."""
        repeats = self.shape[1]
        return _Gather.apply(x_ND, self.order // repeats, self.place, repeats)

    def unsorted(self, y: Tensor) -> Tensor:
        """(N·K, D), sorted by expert, → (N·K, D), by token."""
        return _Gather.apply(y, self.place, self.order, 1)

    def gather(self, y: Tensor, weight_NK: Tensor) -> Tensor:
        """(N·K, D) → (N, D): the weighted sum over the experts that each token went to, in y's dtype."""
        y_NKD = self.unsorted(y).unflatten(0, self.shape)
        return torch.bmm(weight_NK.to(y.dtype).unsqueeze(1), y_NKD).squeeze(1)


class _Gather(torch.autograd.Function):
    """Rows by index; backwards, each row sums up its `repeats` copies, which `back` finds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor, repeats: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.repeats = repeats
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        rows = grad.index_select(0, back)
        return rows.unflatten(0, (-1, ctx.repeats)).sum(1) if ctx.repeats > 1 else rows, None, None, None
