"""Process settings that `import swamla` makes (waiting threads, freed memory), and the processor's name."""

import ctypes
import os
import platform
import re
import sys
from pathlib import Path

# glibc's parameters of `mallopt` (malloc.h).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
# The largest block, in bytes, that is allocated from kept memory. Larger blocks come from the system and return to it.
LARGEST, LARGEST_BEFORE_2_35 = 2**30, 2**25

_prepared: dict[str, str] = {}  # the results of `prepare`, as text


def prepare() -> None:
    """Call `limit_spinning` and `keep_freed_memory`, once per process; the user's environment takes precedence.

    `import swamla` calls it, so that Python programs are as fast as the command line. To prevent both, set
    OMP_WAIT_POLICY, and MALLOC_TRIM_THRESHOLD_ or another of glibc's variables.
    """
    if not _prepared:
        _prepared["waiting threads"] = limit_spinning()
        _prepared["freed memory"] = keep_freed_memory()


def prepared() -> dict[str, str]:
    """What `prepare` did or could not do, as text to print."""
    return dict(_prepared)


def processor() -> str:
    """The processor's name as the system reports it, with family and model numbers if it reports them.

    Processors of several generations may share a name such as "AMD EPYC"; family and model distinguish them.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not on Linux
        text = ""
    first = dict(re.findall(r"^(.+?)\s*: (.+)$", text.partition("\n\n")[0], flags=re.MULTILINE))
    name = first.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{label} {first[key]}" for label, key in (("family", "cpu family"), ("model", "model")) if key in first]
    return f"{name} ({' '.join(numbers)})" if numbers else name


def limit_spinning() -> str:
    """Let torch's threads sleep soon when they wait for each other; torch reads the setting when it is imported.

    By default they spin for milliseconds, which on a busy machine starves the thread that they wait for: beside one
    other busy process a step took over 3 times as long, and with this setting it did not.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return "as the environment says"
    os.environ["GOMP_SPINCOUNT"] = "1000"  # child processes inherit it
    if "torch" in sys.modules:
        return "spin, which slows a busy machine: torch was imported before swamla"
    return "sleep early"


def keep_freed_memory() -> str:
    """Let glibc keep freed memory in the process for the next step.

    By default glibc returns large blocks to the system at once, and the system zeroes new pages in every step: 40 to 70
    thousand page faults, 5 % of a small model's step. The cost is that the process does not shrink. glibc before 2.35
    supports this for blocks of up to 32 MiB only. If it refuses even that, the other parameters are not set either,
    because setting them would fix a threshold at 128 KiB that otherwise grows.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return "as the environment says"
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and any(mallopt(M_MMAP_THRESHOLD, size) for size in (LARGEST, LARGEST_BEFORE_2_35)):
        mallopt(M_TRIM_THRESHOLD, -1)  # never trim
        mallopt(M_TOP_PAD, 64 * 2**20)
        return "kept for the next step"
    return "given back to the system: this C library cannot keep it"
