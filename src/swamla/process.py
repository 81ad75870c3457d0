"""How this process waits and keeps memory: set once, before torch is imported."""

import ctypes
import os

# glibc's names for what `mallopt` sets (malloc.h).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
# Bytes of a block that is taken from the kept memory; larger ones come from the system and go back.
LARGEST, LARGEST_BEFORE_2_35 = 2**30, 2**25


def prepare() -> None:
    """Both of the below; nothing that the user has set in the environment is changed."""
    wait_politely()
    keep_freed_memory()


def wait_politely() -> None:
    """Let torch's threads sleep early when they wait for each other; read when torch is first imported.

    By default they spin, for milliseconds, which on a machine that does anything else starves the very thread they
    wait for: with one busy process beside it a step took over 3 times as long, and no longer with this.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def keep_freed_memory() -> None:
    """Let what one step frees serve the next one, where the C library is glibc.

    By default glibc gives large blocks back to the system as soon as they are free, and every step pays for the same
    pages again, cleared one by one: 40 to 70 thousand faults and 5 % of a small model's step. The price is that the
    process stays as large as it once was. glibc before 2.35 does this for blocks of up to 32 MiB only. Where not even
    that is taken the rest is left alone: it would hold at 128 KiB a threshold that by default grows.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and any(mallopt(M_MMAP_THRESHOLD, size) for size in (LARGEST, LARGEST_BEFORE_2_35)):
        mallopt(M_TRIM_THRESHOLD, -1)  # never
        mallopt(M_TOP_PAD, 64 * 2**20)
