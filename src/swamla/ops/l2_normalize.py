"""L2 normalisation of queries and keys, with a hand-written backward pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def l2_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / √(Σ x² + eps) over the last dimension, as in Qwen3-Next; computed in fp32, returned in x's dtype."""
    # The compiler fuses these ops, and torch 2.11's loses the gradient of the autograd function.
    if torch.compiler.is_compiling():
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
    return _L2Normalize.apply(x, eps)


class _L2Normalize(torch.autograd.Function):
    """Hand-written, because autograd saves three tensors of x's size and reads and writes twice as much memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse)
        return (wide * inverse).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        x, inverse = ctx.saved_tensors
        unit = x.to(inverse.dtype) * inverse
        dy_wide = dy.to(unit.dtype)
        along = (dy_wide * unit).sum(-1, keepdim=True)
        return torch.addcmul(dy_wide, unit, along, value=-1).mul_(inverse).to(x.dtype), None
