"""How this process waits and keeps memory, set by `import swamla`; and the processor it runs on."""

import ctypes
import os
import platform
import re
import sys
from pathlib import Path

# glibc's names for what `mallopt` sets (malloc.h).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
# Bytes of a block that is taken from the kept memory; larger ones come from the system and go back.
LARGEST, LARGEST_BEFORE_2_35 = 2**30, 2**25


_found: dict[str, str] = {}  # what `prepare` could do, for people


def prepare() -> None:
    """Both of the below, once a process; nothing that the user has set in the environment is changed.

    `import swamla` calls it, so that Python programs are as fast as the command line. To keep a process as it is, set
    OMP_WAIT_POLICY, and MALLOC_TRIM_THRESHOLD_ or another of glibc's settings.
    """
    if not _found:
        _found["waiting threads"] = wait_politely()
        _found["freed memory"] = keep_freed_memory()


def prepared() -> dict[str, str]:
    """What `prepare` did, and what it could not."""
    return dict(_found)


def processor() -> str:
    """The processor's name, as the system tells it, with its family and model where it has such numbers.

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
    """Let torch's threads sleep early when they wait for each other; read when torch is first imported.

    By default they spin, for milliseconds, which on a machine that does anything else starves the very thread they
    wait for: with one busy process beside it a step took over 3 times as long, and no longer with this.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return "as the environment says"
    os.environ["GOMP_SPINCOUNT"] = "1000"  # child processes inherit it
    if "torch" in sys.modules:
        return "spin, which slows a busy machine: torch was imported before swamla"
    return "sleep early"


def keep_freed_memory() -> str:
    """Let what one step frees serve the next one, where the C library is glibc.

    By default glibc gives large blocks back to the system as soon as they are free, and every step pays for the same
    pages again, cleared one by one: 40 to 70 thousand faults and 5 % of a small model's step. The price is that the
    process stays as large as it once was. glibc before 2.35 does this for blocks of up to 32 MiB only. Where not even
    that is taken the rest is left alone: it would hold at 128 KiB a threshold that by default grows.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return "as the environment says"
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and any(mallopt(M_MMAP_THRESHOLD, size) for size in (LARGEST, LARGEST_BEFORE_2_35)):
        mallopt(M_TRIM_THRESHOLD, -1)  # never
        mallopt(M_TOP_PAD, 64 * 2**20)
        return "kept for the next step"
    return "given back to the system: this C library cannot keep it"
