"""The peak FLOP/s of a device, and the peak memory of a run."""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from swamla.ops.linear import linear

# Dense bf16 matmul with fp32 accumulation, from data sheets; the first key that is part of the device's name.
_BF16_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "A10G": 70.0,
    "A10": 125.0,
    "A40": 149.7,
    "A6000": 154.8,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "4090": 165.2,
    "3090": 71.0,
}
_SIZE = {"cpu": 1024, "cuda": 8192}  # of the square matrices multiplied
_ROUNDS = 3  # fewest
_clock = time.perf_counter


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Peak FLOP/s of a device, and where the figure comes from."""

    flops: float
    name: str


def peak_of(device: torch.device, precision: str) -> Peak:
    """The device's dense bf16 peak from its data sheet, else the rate of a large matrix product measured here."""
    if device.type == "cuda":
        full_name = torch.cuda.get_device_name(device)
        for part, tflops in _BF16_TFLOPS.items():
            if part in full_name:
                return Peak(flops=tflops * 1e12, name=f"{tflops:g} TFLOP/s, {full_name} bf16 dense")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    flops = _measured_once(device, dtype, torch.get_num_threads())
    kind, size = str(dtype).removeprefix("torch."), _SIZE[device.type]
    return Peak(flops=flops, name=f"{flops / 1e12:.3g} TFLOP/s, measured here on a {kind} product of {size}³")


@lru_cache
def _measured_once(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """`threads` is only a key of the cache."""
    return matmul_flops(device, dtype, seconds=0.05)


@torch.no_grad()
def matmul_flops(device: torch.device, dtype: torch.dtype, *, seconds: float, size: int | None = None) -> float:
    """FLOP/s of a large matrix product, the peak that other rates are compared with.

    The best of several rounds and of the CPU's two matmul libraries, because disturbances only slow a round down.
    The numbers are random, because a GPU multiplies constants faster; they have their own generator, so that the run's
    is unchanged. seconds: about how long to measure. size: of the square matrices.
    """
    size, generator = size or _SIZE[device.type], torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, generator=generator, device=device).to(dtype)
    fastest, rounds, end = float("inf"), 0, _clock() + seconds
    while rounds < _ROUNDS or _clock() < end:
        fastest = min(fastest, *(_seconds_of(multiply, a) for multiply in (torch.matmul, linear)))
        rounds += 1
    return 2 * size**3 / fastest


def _seconds_of(multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], a: torch.Tensor) -> float:
    begin = _clock()
    multiply(a, a)
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    return _clock() - begin


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: of tensors on a CUDA device; of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
