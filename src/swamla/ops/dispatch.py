"""Dispatch of tokens to experts: rows sorted by expert, and the weighted sum of the experts' outputs."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Dispatch:
    """The permutation that sorts N·K rows by expert, for N tokens that each go to K of E experts.

    The sort is stable: an expert's rows are in the order of the tokens. Forward and backward move rows by gathers, so
    that sums have the same order on every device.

    expert_NK: expert indices.  surplus: whether the index `n_experts` may occur, which means no expert: such rows come
    last, after `ends_E[-1]`.  ends_E: int32, the end of each expert's rows.
    """

    def __init__(self, expert_NK: Tensor, n_experts: int, *, surplus: bool = False) -> None:
        self.expert_NK, self.shape, self.surplus = expert_NK, expert_NK.shape, surplus
        if torch.compiler.is_exporting():  # other runtimes' sorts are not stable: every expert gets every token there
            return
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
        """(N, D) → (N·K, D): one row per token and expert, sorted by expert."""
        repeats = self.shape[1]
        return _Gather.apply(x_ND, self.order // repeats, self.place, repeats)

    def unsorted(self, y: Tensor) -> Tensor:
        """(N·K, D) sorted by expert → (N·K, D) sorted by token."""
        return _Gather.apply(y, self.place, self.order, 1)

    def gather(self, y: Tensor, weight_NK: Tensor) -> Tensor:
        """(N·K, D) → (N, D): the weighted sum over each token's experts, in y's dtype."""
        y_NKD = self.unsorted(y).unflatten(0, self.shape)
        return torch.bmm(weight_NK.to(y.dtype).unsqueeze(1), y_NKD).squeeze(1)


class _Gather(torch.autograd.Function):
    """x[index]. The gradient of each row of x is the sum over its `repeats` copies, which are at `back`."""

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
