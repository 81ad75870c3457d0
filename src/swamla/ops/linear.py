"""Linear maps without gradients, on a CPU by the library that is fast on it."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from swamla.process import processor

# Below so many weights, and rows, the call itself costs more than it saves.
WEIGHTS, ROWS = 2**17, 16


def linear(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """x Wᵀ + b over the last dimension of x, the same as `F.linear`; with gradients or autocast it is `F.linear`.

    In fp32 on a CPU PyTorch leaves this to MKL. On Intel's processors that is the faster one, up to twice for a single
    row; on other makers' it runs at half the rate of oneDNN, for one row as for many, which comes with PyTorch and is
    what that itself uses for bf16. The maker decides, not a race: what is generated must not depend on one.
    """
    # The maker first: for a single row a few microseconds of questions are a fifth of the product.
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
    dense = weight_FD.is_contiguous() or weight_FD.mT.is_contiguous()  # other strides would take it seconds
    return worthwhile and dense and torch.backends.mkldnn.is_available()
