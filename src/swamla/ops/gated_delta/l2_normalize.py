"""Queries and keys of unit length."""

from torch import Tensor


def l2_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x * (x * x).sum(-1, keepdim=True).add(eps).rsqrt()
