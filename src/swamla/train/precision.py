"""Which number format the forward pass computes in, chosen once per run, printed and stored with it."""

from contextlib import AbstractContextManager
from typing import Literal

import torch

from swamla.errors import MissingBackendError

Precision = Literal["auto", "fp32", "bf16", "fp8"]
Chosen = Literal["fp32", "bf16", "fp8"]


def bf16_is_fast(device: torch.device) -> bool:
    """True where bf16 matrix products run on dedicated instructions (CUDA tensor cores, AVX512-BF16, AMX)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # mkldnn's own check also accepts plain AVX512, where bf16 is emulated and slower than fp32.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resolve_precision(asked: Precision, device: torch.device) -> Chosen:
    """What "auto" means on `device`, which is never fp8; anything else is taken as asked."""
    if asked == "auto":
        return "bf16" if bf16_is_fast(device) else "fp32"
    return asked


def without_fp8(chosen: Chosen) -> Literal["fp32", "bf16"]:
    """What a trained model computes in: fp8 is for training, and such a run's weights are ordinary ones."""
    return "bf16" if chosen == "fp8" else chosen


def resolve_device(asked: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """What "auto" means on this machine. Raises `MissingBackendError` for a CUDA device that is not there."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise MissingBackendError("device = cuda: torch sees no CUDA device here; use device = cpu, or auto")
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")


def autocast(precision: Chosen, device: torch.device) -> AbstractContextManager[object]:
    """The context of a forward pass: weights stay fp32, matrix products run in bf16 where that was chosen.

    With "fp8" too, for all products but those that `swamla.train.fp8` converted.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision != "fp32")
