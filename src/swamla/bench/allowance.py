"""The time and memory left for measuring, to skip what would not fit."""

import time
from pathlib import Path

import torch

from swamla.bench.measuring import memory_bytes

_clock = time.monotonic


class Allowance:
    """A budget of seconds from now on."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._begin = seconds, _clock()

    @property
    def spent(self) -> float:
        """Seconds spent."""
        return _clock() - self._begin

    def until(self, share: float) -> float:
        """Seconds left until this share of the budget is spent; at least 0."""
        return max(0.0, share * self.seconds - self.spent)


def free_memory(device: torch.device) -> int:
    """Free bytes of a CUDA device, or of the machine as far as the system reports it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # no Linux
        return memory_bytes()
    fields = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
    return min(memory_bytes(), 1024 * int(fields["MemAvailable"].split()[0]))
