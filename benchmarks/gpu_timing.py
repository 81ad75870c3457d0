"""Timing for the rows of the GPU benchmark, and the peak rates of the GPU."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from benchmarks.gpu_running import Figures, Place
from swamla.bench.measuring import Timing, interleaved, seconds_of
from swamla.train.utilisation import matmul_flops as measured_flops

FP8_MULTIPLE = 16  # fp8 products need multiples of this as sides


def timed(run: Callable[[], object], place: Place, *, rounds: int = 30, warmup: int = 3, limit: float = 1.0) -> Timing:
    """The time of a call; if quick, of a single call."""
    if place.quick:
        return Timing.of([seconds_of(run)])
    return interleaved({"": run}, rounds=rounds, warmup=warmup, limit=limit)[""]


def times(timing: Timing) -> Figures:
    """A timing as the figures of a row."""
    return {"median_s": timing.median, "low_s": timing.low, "high_s": timing.high, "rounds": timing.rounds}


def used(backends: Mapping[str, str]) -> list[str]:
    """ "op/backend" for the result of `resolve_backends`, without the reasons that follow a backend's name."""
    return [f"{op}/{backend.split()[0]}" for op, names in backends.items() for backend in names.split(" and ")]


def matmul_flops(place: Place, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP/s of a large product of random matrices, measured now."""
    return measured_flops(torch.device(place.device), dtype, seconds=0.5, size=128 if place.quick else None)


def fp8_flops(place: Place) -> float:
    """As `matmul_flops`, in fp8 with one scale per tensor."""
    size = 128 if place.quick else 8192
    a, b = (torch.randn(size, size, device=place.device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=place.device)
    run = partial(torch._scaled_mm, a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
    return 2 * size**3 / timed(run, place, rounds=100, limit=0.5).median


def copy_bytes(place: Place) -> float:
    """Bytes per second, read and written, of a large copy."""
    count = 1 << (16 if place.quick else 30)
    source, target = (torch.randint(255, (count,), device=place.device, dtype=torch.uint8) for _ in range(2))
    return 2 * count / timed(partial(target.copy_, source), place, rounds=100, limit=0.5).median


def ceilings(place: Place) -> Iterator[Figures]:
    """All peak rates, one by one, because not every GPU has fp8."""
    yield {"bf16_flops": matmul_flops(place)}
    yield {"copy_bytes": copy_bytes(place)}
    yield {"fp16_flops": matmul_flops(place, torch.float16)}
    yield {"fp8_flops": fp8_flops(place)}
