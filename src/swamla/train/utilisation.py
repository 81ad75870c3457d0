"""What a run makes of its machine: how fast it could compute, and how much memory it took."""

import resource
import sys
import time
from dataclasses import dataclass
from functools import lru_cache

import torch

# Dense bf16 products with fp32 sums, from data sheets, by a part of the device's name; the first that fits.
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
_SIZE = 768


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The most a device computes: flops a second, and where the figure is from."""

    flops: float
    name: str


def peak_of(device: torch.device, precision: str) -> Peak:
    """The device's dense bf16 peak where it is known, else what a matrix product reaches here and now."""
    if device.type == "cuda":
        full_name = torch.cuda.get_device_name(device)
        for part, tflops in _BF16_TFLOPS.items():
            if part in full_name:
                return Peak(flops=tflops * 1e12, name=f"{tflops:g} TFLOP/s, {full_name} bf16 dense")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    flops = _measured(device, dtype, torch.get_num_threads())
    kind = str(dtype).removeprefix("torch.")
    return Peak(flops=flops, name=f"{flops / 1e12:.3g} TFLOP/s, measured here on a {kind} product of {_SIZE}³")


@lru_cache
def _measured(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """The best of a few products: some 20 ms on a CPU, once per process. `threads` only tells results apart."""
    # Random, as a GPU multiplies constants too fast; by a generator of its own, as the run's must not move.
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(_SIZE, _SIZE, generator=generator, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - begin)
    return 2 * _SIZE**3 / best


def peak_memory(device: torch.device) -> int:
    """Bytes that tensors on a CUDA device took at most so far; on a CPU those that the process did."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
