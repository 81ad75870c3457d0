"""RMSNorm (arXiv 1910.07467) with a hand-written backward pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

FEW = 2**14  # elements up to which, without gradients, one kernel launch is cheaper than fewer passes over memory


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight over the last dimension; any shape, result in x's dtype (arXiv 1910.07467, eq. 4).

    On CPUs, where PyTorch has no fused RMSNorm, the backward pass is LayerNorm's with one correction: it moves six
    times the bytes of x, autograd's about fifteen times (first derivatives only). Elsewhere it is PyTorch's own.
    """
    plain = x.device.type != "cpu" or torch.compiler.is_exporting()
    if plain or (x.numel() <= FEW and not torch.is_grad_enabled()):
        return F.rms_norm(x, (x.shape[-1],), weight_D.to(x.dtype), eps)
    return _RMSNorm.apply(x, weight_D, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_ND = x.reshape(-1, x.shape[-1])
        sums = torch.promote_types(x.dtype, torch.float32)
        mean_square_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True, dtype=sums).square_().div_(x.shape[-1])
        scale_N1 = mean_square_N1.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale_N1)
        return (x_ND * scale_N1).mul_(weight_D).to(x.dtype).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With r the scale and n = x r: dw = Σ g n, dx = r (g w − n · mean(g w n)).

        LayerNorm's with a mean of 0, but for the term −r · mean(g w) that comes from centring x.
        """
        x, weight_D, scale_N1 = ctx.saved_tensors  # activation checkpointing allows one access only
        width, weight_dtype = x.shape[-1], weight_D.dtype
        x_ND, grad_ND = x.reshape(-1, width).to(scale_N1.dtype), grad.reshape(-1, width).to(scale_N1.dtype)
        weight_D = weight_D.to(scale_N1.dtype)
        dx_ND, d_weight_D, _ = torch.ops.aten.native_layer_norm_backward(
            grad_ND, x_ND, [width], torch.zeros_like(scale_N1), scale_N1, weight_D, None, [True, True, False]
        )
        dx_ND.add_(torch.mv(grad_ND, weight_D)[:, None].mul_(scale_N1).div_(width))
        return dx_ND.to(x.dtype).view(x.shape), d_weight_D.to(weight_dtype), None
