"""The precision of the forward pass: chosen once per run, printed and stored with it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F

from swamla.errors import MissingBackendError
from swamla.ops.gradients import gradients
from swamla.train.racing import Choice, choose, kept_choice, races_on

Precision = Literal["auto", "fp32", "bf16", "fp8"]
Chosen = Literal["fp32", "bf16", "fp8"]


def has_bf16(device: torch.device) -> bool:
    """True where bf16 matrix products run on dedicated instructions (CUDA tensor cores, AVX512-BF16, AMX)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # mkldnn's own check also accepts plain AVX512, where bf16 is emulated and slower than fp32.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@dataclass(frozen=True)
class ProductsTrial:
    """Races a feed-forward layer under bf16 autocast, casts included, against fp32."""

    width: int = 512
    tokens: int = 2048

    def __str__(self) -> str:
        return f"products with {self.width} × {4 * self.width} weights, casts included"

    def paths(self, dtype: torch.dtype) -> tuple[str, ...]:
        """bf16 and fp32, the default first."""
        return ("bf16", "fp32")

    def scores(self, length: int, part: int) -> int:
        """Tokens of a pass."""
        return max(1, length // part)

    def step(self, path: str, length: int, dtype: torch.dtype, part: int = 1) -> Callable[[], object]:
        """A forward and backward pass of `length` / `part` tokens. Leaves the global random generators unchanged."""
        generator = torch.Generator().manual_seed(0)
        tokens = (self.scores(length, part), self.width)
        shapes = (tokens, (4 * self.width, self.width), (self.width, 4 * self.width))
        inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
        upstream = torch.randn(tokens, generator=generator).to(torch.bfloat16 if path == "bf16" else torch.float32)

        def step() -> object:
            x_TD, up_FD, down_DF = inputs
            with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=path == "bf16"):
                return gradients(F.linear(F.silu(F.linear(x_TD, up_FD)), down_DF), inputs, upstream)

        return step


def measured_precision(device: torch.device, *, race: bool = True) -> Choice | None:
    """Which of bf16 and fp32 trains faster on a CPU that has bf16 instructions; None on other devices.

    On some CPUs bf16 instructions run at half the rate of fp32. race: False to use only earlier measurements.
    """
    if not races_on(device) or not has_bf16(device):
        return None
    trial = ProductsTrial()
    if not race:
        return kept_choice(trial, None, length=trial.tokens)
    return choose({trial}, None, length=trial.tokens)[trial]


def resolve_precision(asked: Precision, device: torch.device, *, race: bool = True) -> Chosen:
    """What "auto" means on `device`, never fp8; other values are returned as they are. race: as above."""
    if asked != "auto":
        return asked
    if (choice := measured_precision(device, race=race)) is not None:
        return cast(Chosen, choice.chosen)
    return "bf16" if has_bf16(device) else "fp32"


def resolve_as_trained(asked: Precision, trained: str, device: torch.device) -> Literal["fp32", "bf16"]:
    """Precision to evaluate a run in: its training precision, but bf16 only if `device` supports it.

    asked: the precision in the config.  trained: the precision in the checkpoint.
    """
    if asked == "auto" and (trained == "fp32" or (trained == "bf16" and has_bf16(device))):
        return "fp32" if trained == "fp32" else "bf16"
    return without_fp8(resolve_precision(asked, device))


def without_fp8(chosen: Chosen) -> Literal["fp32", "bf16"]:
    """The precision for inference: bf16 in place of fp8, which is for training only and leaves weights in fp32."""
    return "bf16" if chosen == "fp8" else chosen


def resolve_device(asked: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device that "auto" means here. Raises `MissingBackendError` for "cuda" without a CUDA device."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise MissingBackendError("device = cuda: torch sees no CUDA device here; use device = cpu, or auto")
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")


def autocast(precision: Chosen, device: torch.device) -> AbstractContextManager[object]:
    """Context of a forward pass: fp32 weights, and matrix products in bf16 unless `precision` is "fp32".

    With "fp8" this applies to the products that `swamla.train.fp8` did not convert.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision != "fp32")
