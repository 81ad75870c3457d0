"""Process settings made by `import swamla`: waiting threads and freed memory. And the processor's name."""

import ctypes
import os
import platform
import re
import sys
from pathlib import Path

# glibc's names for what `mallopt` sets (malloc.h).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
# Largest block in bytes that is served from kept memory; the system serves larger ones and takes them back.
LARGEST, LARGEST_BEFORE_2_35 = 2**30, 2**25


_found: dict[str, str] = {}  # what `prepare` did, as text


def prepare() -> None:
    """Call `wait_politely` and `keep_freed_memory`, once a process; the user's environment settings take precedence.

    `import swamla` calls it, so that Python programs are as fast as the command line. To keep a process as it is, set
    OMP_WAIT_POLICY, and MALLOC_TRIM_THRESHOLD_ or another of glibc's settings.
    """
    if not _found:
        _found["waiting threads"] = wait_politely()
        _found["freed memory"] = keep_freed_memory()


def prepared() -> dict[str, str]:
    """What `prepare` did or could not do, as text."""
    return dict(_found)


def processor() -> str:
    """The processor's name from the system, with family and model numbers if there are any.

    Machines of several generations may share a name, as in "AMD EPYC"; family and model tell them apart.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # no Linux
        text = ""
    first = dict(re.findall(r"^(.+?)\s*: (.+)$", text.partition("\n\n")[0], flags=re.MULTILINE))
    name = first.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{label} {first[key]}" for label, key in (("family", "cpu family"), ("model", "model")) if key in first]
    return f"{name} ({' '.join(numbers)})" if numbers else name


def wait_politely() -> str:
    """Let torch's threads sleep early when they wait for each other; torch reads the setting when it is first imported.

    By default they spin for milliseconds, which on a busy machine starves the very thread they wait for: with one other
    busy process a step took over 3 times as long; with this setting it did not.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return "as the environment says"
    os.environ["GOMP_SPINCOUNT"] = "1000"  # child processes inherit it
    if "torch" in sys.modules:
        return "spin, which slows a busy machine: torch was imported before swamla"
    return "sleep early"


def keep_freed_memory() -> str:
    """Keep freed memory in the process for the next step, with glibc.

    By default glibc returns large blocks to the system at once, so every step pays again for zeroed pages: 40 to 70
    thousand page faults and 5 % of a small model's step. The price is that the process does not shrink. glibc before
    2.35 supports this for blocks of up to 32 MiB only. If it refuses even that, the other thresholds are not set
    either: setting them would fix at 128 KiB a threshold that otherwise grows.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return "as the environment says"
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and any(mallopt(M_MMAP_THRESHOLD, size) for size in (LARGEST, LARGEST_BEFORE_2_35)):
        mallopt(M_TRIM_THRESHOLD, -1)  # never
        mallopt(M_TOP_PAD, 64 * 2**20)
        return "kept for the next step"
    return "given back to the system: this C library cannot keep it"
