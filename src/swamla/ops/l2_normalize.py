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
        """With n the norm and y = x / n: dx = (dy − y Σ dy y) / n."""
        x, inverse = ctx.saved_tensors
        if x.device.type == "cpu" and x.dtype != torch.float16:
            return _weight_norm_backward(dy, x, inverse), None
        unit = x.to(inverse.dtype) * inverse
        dy_wide = dy.to(unit.dtype)
        along = (dy_wide * unit).sum(-1, keepdim=True)
        return torch.addcmul(dy_wide, unit, along, value=-1).mul_(inverse).to(x.dtype), None


def _weight_norm_backward(dy: Tensor, x: Tensor, inverse: Tensor) -> Tensor:
    """The same by the kernel of weight normalisation (arXiv 1602.07868) at a gain of 1: one pass, in fp32 inside."""
    x_ND, dy_ND = (t.reshape(-1, x.shape[-1]).contiguous() for t in (x, dy))
    norm_N1 = inverse.reshape(-1, 1).reciprocal()
    gain_N1 = torch.ones_like(norm_N1, dtype=x.dtype)
    dx_ND, _ = torch.ops.aten._weight_norm_interface_backward(dy_ND, x_ND, gain_N1, norm_N1, 0)
    return dx_ND.view(x.shape)
