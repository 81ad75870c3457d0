"""Autocast as ops ask for it: torch's own questions raise on the meta device, which has no autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of autocast on a device type; None where it is off."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(device: str) -> AbstractContextManager[object]:
    """A context without autocast on a device type."""
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product with x: autocast's, or x's own without autocast and for fp64."""
    return x.dtype if x.dtype == torch.float64 else autocast_dtype(x.device.type) or x.dtype
