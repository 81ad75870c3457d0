"""What a process sets before torch is at work."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from swamla import process

FREE_AND_TAKE = """
import resource, sys
if sys.argv[1] == "kept":
    import swamla
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(200_000_000)  # cleared by writing to every page, or by the system when it gives a new one
    block[::4096] = b"x" * len(block[::4096])
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def faults_of_a_block_taken_again(how: str, **environment: str) -> int:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", FREE_AND_TAKE, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**inherited, **environment})
    return int(done.stdout)


def prepared_by(code: str, **environment: str) -> list[str]:
    """What a new Python says that `prepare` did, and how its threads wait."""
    settings = ("MALLOC_", "GLIBC_", "OMP_WAIT", "GOMP_SPIN")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
    code += "; import os, swamla.process; print(*swamla.process.prepared().values(), sep=chr(10))"
    code += "; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**inherited, **environment}
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("way", ["import swamla", "from swamla import train", "import swamla.ops", "import swamla.cli"])
def test_every_way_into_the_library_prepares_before_torch_is_there(way: str) -> None:
    waiting, memory, spins = prepared_by(way)
    assert (waiting, spins) == ("sleep early", "1000")
    assert memory.startswith("kept" if platform.libc_ver()[0] == "glibc" else "given back")


def test_it_is_told_where_torch_came_first() -> None:
    waiting, memory, _ = prepared_by("import sys; sys.modules['torch'] = sys; import swamla")  # a stand-in is quicker
    assert "torch was imported before swamla" in waiting
    assert memory.startswith("kept" if platform.libc_ver()[0] == "glibc" else "given back")


def test_what_the_user_has_set_stays() -> None:
    waiting, memory, spins = prepared_by("import swamla", OMP_WAIT_POLICY="ACTIVE", MALLOC_TRIM_THRESHOLD_="131072")
    assert (waiting, memory, spins) == ("as the environment says", "as the environment says", "None")


def test_the_processor_has_a_name() -> None:
    assert process.processor().strip()
    assert "\n" not in process.processor()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's memory can be kept")
def test_freed_memory_serves_again_without_faults() -> None:
    pages = 200_000_000 // 4096
    assert faults_of_a_block_taken_again("kept") < pages / 10
    assert faults_of_a_block_taken_again("as it is") > pages / 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's memory can be kept")
def test_memory_is_left_to_a_user_who_has_set_how_it_is_kept() -> None:
    assert faults_of_a_block_taken_again("kept", MALLOC_TRIM_THRESHOLD_="131072") > 200_000_000 // 4096 / 2


@pytest.mark.parametrize(
    ("largest", "threshold"), [(2**40, 2**30), (2**25, 2**25), (0, None)], ids=["any size", "32 MiB", "none"]
)
def test_the_largest_block_that_the_c_library_takes_is_set_or_nothing_at_all(
    monkeypatch: pytest.MonkeyPatch, largest: int, threshold: int | None
) -> None:
    settings: dict[int, int] = {}

    def mallopt(name: int, value: int) -> int:
        taken = name != process.M_MMAP_THRESHOLD or value <= largest
        if taken:
            settings[name] = value
        return int(taken)

    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(process.ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    process.keep_freed_memory()
    others = {process.M_TRIM_THRESHOLD: -1, process.M_TOP_PAD: 2**26}
    assert settings == ({} if threshold is None else {process.M_MMAP_THRESHOLD: threshold, **others})
