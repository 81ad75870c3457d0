"""Time to measure in, and what of it and of memory is left: what would not fit is told, not begun."""

import time
from pathlib import Path

import torch

from swamla.bench.measuring import memory_bytes

_clock = time.monotonic


class Allowance:
    """Seconds that may be spent from now on."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._begin = seconds, _clock()

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return _clock() - self._begin

    def until(self, share: float) -> float:
        """Seconds left until this share of all is spent; never below 0."""
        return max(0.0, share * self.seconds - self.spent)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken: of a CUDA device, or of the machine, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # no Linux
        return memory_bytes()
    told = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
    return min(memory_bytes(), 1024 * int(told["MemAvailable"].split()[0]))
