"""Linear maps for inference, on a CPU by the faster of its matmul libraries."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swamla.process import processor

# With fewer weights and fewer rows than these, the overhead of the call exceeds the gain.
WEIGHTS, ROWS = 2**17, 16


def linear(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """x Wᵀ + b over the last dimension of x, as `F.linear`; with gradients or autocast it is `F.linear`.

    In fp32 on a CPU, PyTorch calls MKL. On Intel processors MKL is the faster library, up to twice as fast for a single
    row. On others it runs at half the rate of oneDNN, which PyTorch includes and uses for bf16. The processor's vendor
    decides, not a measurement, because generated text must not depend on a measurement.
    """
    # The cached vendor first: for a single row, a few microseconds of checks are a fifth of the product.
    if torch.compiler.is_compiling() or _made_by_intel() or torch.is_grad_enabled() or not _suits_onednn(x, weight_FD):
        return F.linear(x, weight_FD, bias_F)
    return torch.ops.mkldnn._linear_pointwise(x, weight_FD, bias_F, "none", [], "")


@cache
def _made_by_intel() -> bool:
    return "intel" in processor().lower()


def _suits_onednn(x: Tensor, weight_FD: Tensor) -> bool:
    if x.dtype != torch.float32 or x.device.type != "cpu" or weight_FD.dtype != torch.float32:
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    worthwhile = weight_FD.numel() >= WEIGHTS or x.numel() >= ROWS * x.shape[-1]
    dense = weight_FD.is_contiguous() or weight_FD.mT.is_contiguous()  # other strides take oneDNN seconds
    return worthwhile and dense and torch.backends.mkldnn.is_available()


def matrix_of(layer: nn.Module) -> Tensor:
    """The matrix (out, in) of a linear layer, or of a module in its place, such as one with an adapter.

    The latter has to have `in_features` and `weight`; its matrix is what it does to unit vectors.
    """
    if isinstance(layer, nn.Linear):
        return layer.weight
    width, weight = getattr(layer, "in_features"), getattr(layer, "weight")  # noqa: B009 - nn.Module declares neither
    unit = torch.eye(width, dtype=weight.dtype, device=weight.device)
    return (layer(unit) - layer(torch.zeros_like(unit[:1]))).T
