"""Measure time, memory, and the machine's peak rates, with which speeds are compared."""

import ctypes
import gc
import os
import pickle
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from swamla.data.units import available_cores
from swamla.process import processor
from swamla.train.racing import describe_cpu
from swamla.train.utilisation import matmul_flops

Run = Callable[[], object]

_clock = time.perf_counter
_COPIED = {"cpu": 1 << 28, "cuda": 1 << 30}  # bytes copied: more than any cache


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of one contender, in seconds per round.

    median: of all rounds.
    low: the lower quartile.
    high: the upper quartile.
    rounds: number of timed rounds.
    """

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        """Median and quartiles of at least one round."""
        if len(seconds) == 1:
            low = median = high = seconds[0]
        else:
            low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median=median, low=low, high=high, rounds=len(seconds))


def interleaved(
    contenders: Mapping[str, Run], *, rounds: int, warmup: int = 1, limit: float | None = None
) -> dict[str, Timing]:
    """Time contenders alternately, A B A B …, so that a slower machine slows them all.

    warmup: untimed rounds first. limit: seconds, warm-up included, after which no further round starts; each contender
    is timed at least once.
    """
    begin = _clock()
    for _ in range(warmup):
        for run in contenders.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(max(1, rounds)):
        if number and limit is not None and _clock() - begin >= limit:
            break
        for name, run in contenders.items():
            seconds[name].append(seconds_of(run))
    return {name: Timing.of(found) for name, found in seconds.items()}


def seconds_of(run: Run) -> float:
    """Seconds that `run` takes, including its work on a CUDA device."""
    synchronize()
    begin = _clock()
    run()
    synchronize()
    return _clock() - begin


def synchronize() -> None:
    """Wait for a CUDA device in use to finish its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def ceilings(device: torch.device | str = "cpu", *, seconds: float = 1.0) -> dict[str, float]:
    """The machine's peak rates per second: FLOPs of large matrix products, bytes read and written by copies.

    "fp32_flops" and "bf16_flops" from `matmul_flops`, as for MFU, and "copy_bytes", a median.
    seconds: how long to measure each, about.
    """
    device = torch.device(device)
    found = {
        "fp32_flops": matmul_flops(device, torch.float32, seconds=seconds),
        "bf16_flops": matmul_flops(device, torch.bfloat16, seconds=seconds),
    }
    n_bytes = _COPIED[device.type]
    source, target = (torch.ones(n_bytes // 4, device=device) for _ in range(2))
    copying = interleaved({"": partial(target.copy_, source)}, rounds=50, warmup=2, limit=seconds)[""]
    return found | {"copy_bytes": 2 * n_bytes / copying.median}


def machine() -> dict[str, object]:
    """A description of the machine, without names or addresses."""
    return {
        "processor": processor(),
        "instructions": describe_cpu()["instructions"],
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def memory_bytes() -> int:
    """Bytes of memory available to this process: the machine's, or its container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def peak_memory(run: Run) -> int:
    """Peak bytes during `run()` above those before it.

    With a CUDA device in use: of its tensors. Else of the whole process: on Linux by the kernel's high-water mark,
    elsewhere by that of a child process, which runs `run` on one thread; its effects are lost.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    _trim_heap()
    if sys.platform == "linux" and _reset_high_water():
        before = _status_bytes("VmRSS")
        run()
        return max(0, _status_bytes("VmHWM") - before)
    return peak_memory_of_child(run)


def _trim_heap() -> None:
    """Return freed memory to the system, so that allocating it again is measured."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only; other libraries keep less memory
    if trim is not None:
        trim(0)


def _reset_high_water() -> bool:
    """Reset the high-water mark of this process; False if that is not allowed."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:  # some containers
        return False
    return True


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found, f"Linux reports {name} for every process"
    return 1024 * int(found[1])


def peak_memory_of_child(run: Run) -> int:
    """`peak_memory` in a forked process, for systems whose mark cannot be reset. Raises what `run` does."""
    _trim_heap()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            _answer(run, write)
        finally:
            os._exit(0)  # the child must never return
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        received = pipe.read()
    os.waitpid(child, 0)
    if not received:
        raise RuntimeError("the process that measured memory ended without a result")
    answer = pickle.loads(received)  # safe: written by our own child
    if isinstance(answer, Exception):
        raise answer
    return answer


def _answer(run: Run, write: int) -> None:
    answer: int | Exception
    torch.set_num_threads(1)  # a forked process has no other threads
    torch.ones(1024).sum()  # a forked process maps code again at its first use, up to 13 MB
    before = _high_water()
    try:
        run()
        answer = _high_water() - before
    except Exception as error:
        answer = error
    with os.fdopen(write, "wb") as pipe:
        pipe.write(pickle.dumps(answer))


def _high_water() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
