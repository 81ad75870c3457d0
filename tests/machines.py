"""`python -m tests.machines [WORDS …]`: the suite on the machines that this one can play, or some of them.

Instruction sets are limited by the variables of oneDNN, ATen and MKL; other versions of Python and torch get virtual
environments of their own, made on first use. Each writes its line of docs/reliability.md; WORDS choose some of them.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from tests.pages import MACHINES_HEADING, RELIABILITY, ROOT, replace_part

CONSTRAINTS = ROOT / "constraints.txt"
# The fault matrix is `make faults`. Instructions and threads change what computes, which none of the others' parts do.
FAULTS = ("tests/faults/test_matrix.py",)
COMPUTE_NOTHING_OF_THEIR_OWN = ("tests/data", "tests/cli", "tests/distributed", "tests/faults", "tests/mutants")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine to play. limits: environment variables.  needs: the flag that the CPU must have for it (Linux' names).

    python, torch: other versions than those that run this, e.g. "3.12" and "2.11.0".
    """

    name: str
    threads: int
    limits: dict[str, str] = field(default_factory=dict)
    needs: str = ""
    python: str = ""
    torch: str = ""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Tests that are not run: of a machine that is only limited those that compute nothing of their own."""
        limited = bool(self.limits) or self.threads > 1
        return COMPUTE_NOTHING_OF_THEIR_OWN if limited else FAULTS

    @property
    def means(self) -> str:
        """What is set, for people."""
        versions = [f"Python {self.python}"] * bool(self.python) + [f"torch {self.torch}"] * bool(self.torch)
        limits = [f"`{name}={value}`" for name, value in self.limits.items()]
        return ", ".join([*versions, *limits]) or "nothing"


def _isa(one_dnn: str, aten: str, mkl: str) -> dict[str, str]:
    return {"ONEDNN_MAX_CPU_ISA": one_dnn, "ATEN_CPU_CAPABILITY": aten, "MKL_ENABLE_INSTRUCTIONS": mkl}


# Limits are combined, so that each value, and each number of threads, is met at least once.
MACHINES = (
    Machine(name="as it is, one thread", threads=1),
    Machine(name="as it is, two threads", threads=2),
    Machine(name="without vector units in ATen", threads=2, limits=_isa("SSE41", "default", "SSE4_2"), needs="sse4_2"),
    Machine(name="a laptop with AVX2", threads=1, limits=_isa("AVX2", "avx2", "AVX2"), needs="avx2"),
    Machine(name="AVX512 without bf16", threads=4, limits=_isa("AVX512_CORE", "avx512", "AVX512"), needs="avx512bw"),
    Machine(
        name="AVX512 with bf16", threads=2, limits=_isa("AVX512_CORE_BF16", "avx512", "AVX512"), needs="avx512_bf16"
    ),
    Machine(name="AMX", threads=2, limits=_isa("AVX512_CORE_AMX", "avx512", "AVX512"), needs="amx_bf16"),
    Machine(name="the oldest torch", threads=1, torch="2.11.0"),
    Machine(name="another Python", threads=1, python="3.12"),
    Machine(name="another Python and torch", threads=1, python="3.13", torch="2.12.1"),
    Machine(name="the newest Python", threads=1, python="3.14"),
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the suite said on a machine; why: it was not tried there."""

    machine: Machine
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    why: str = ""

    @property
    def told(self) -> str:
        if self.why:
            return f"not tried: {self.why}"
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


class NotHere(Exception):
    """This machine cannot play that one."""


def main(words: list[str]) -> int:
    """Play machines, print what the suite says on each, and write each machine's line of the page as it is done."""
    chosen = [m for m in MACHINES if all(word.lower() in f"{m.name} {m.means}".lower() for word in words)]
    failed = False
    for machine in chosen:
        print(f"{machine.name} ({machine.means}; threads {machine.threads}) …", flush=True)
        result = _play(machine)
        failed = failed or bool(result.failed)
        print(f"  {result.told}, {result.seconds:.0f} s", flush=True)
        replace_part(RELIABILITY, MACHINES_HEADING, _part(lines_of(RELIABILITY) | {machine.name: _line(result)}))
    return int(failed)


def lines_of(page: Path) -> dict[str, str]:
    """The lines of the table on the page, by the machine's name."""
    _, _, part = page.read_text(encoding="utf-8").partition(f"{MACHINES_HEADING}\n")
    names = {machine.name for machine in MACHINES}
    lines = ((line.split("|")[1].strip(), line) for line in part.splitlines() if line.count("|") > 2)
    return {name: line for name, line in lines if name in names}


def _play(machine: Machine) -> Result:
    started = time.monotonic()
    try:
        python = _interpreter(machine)
    except NotHere as why:
        return Result(machine=machine, why=str(why))
    # Test processes share out the cores as in `make test`, however many threads each believes to have.
    command = [str(python), "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-n", "2"]
    threads = {name: str(machine.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*command, "--dist", "loadscope", *(f"--ignore={part}" for part in machine.left_out)],
        cwd=ROOT,
        env={**os.environ, **offline, **threads, **machine.limits},
        capture_output=True,
        text=True,
    )
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout)}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    if done.returncode != 0:
        print(f"{done.stdout[-20_000:]}{done.stderr[-2_000:]}", file=sys.stderr, flush=True)
        failed = max(failed, 1)
    return Result(
        machine=machine,
        passed=counts.get("passed", 0),
        failed=failed,
        skipped=counts.get("skipped", 0),
        seconds=time.monotonic() - started,
    )


def _interpreter(machine: Machine) -> Path:
    """The Python that plays `machine`, in an environment that is made where there is none. NotHere: why none can be."""
    if machine.needs and machine.needs not in _cpu_flags():
        raise NotHere(f"this CPU has no {machine.needs}")
    if not machine.python and not machine.torch:
        return Path(sys.executable)
    python = shutil.which(f"python{machine.python}") if machine.python else sys.executable
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        raise NotHere(f"no python{machine.python} on the PATH")
    torch = machine.torch or version("torch").split("+")[0]
    folder = ROOT / ".venv-machines" / f"python{machine.python or platform.python_version()}-torch{torch}"
    if not (folder / "made").exists():
        _make_environment(python, torch, folder)
    return folder / "bin" / "python"


def _make_environment(python: str, torch: str, folder: Path) -> None:
    pins = re.sub(r"(?m)^torch==.*$", f"torch=={torch}", CONSTRAINTS.read_text(encoding="utf-8"))
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-compile"]
    steps = (
        [python, "-m", "venv", "--clear", str(folder)],
        [*pip, f"torch=={torch}"],  # by itself first: it decides between builds
        [*pip, "--constraint", str(folder / "constraints.txt"), "--editable", f"{ROOT}[dev]"],
    )
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            raise NotHere(f"pip: {(done.stderr.strip().splitlines() or ['failed'])[-1][:200]}")
        (folder / "constraints.txt").write_text(pins, encoding="utf-8")
    (folder / "made").touch()


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    return frozenset(next((line for line in text.splitlines() if line.startswith("flags")), "").split())


def _line(result: Result) -> str:
    machine = result.machine
    which = "what computes" if machine.left_out == COMPUTE_NOTHING_OF_THEIR_OWN else "all"
    cells = (machine.name, machine.means, machine.threads, which, result.told, f"{result.seconds:.0f}")
    return f"| {' | '.join(map(str, cells))} | {time.strftime('%Y-%m-%d')} |"


def _part(lines: dict[str, str]) -> str:
    from swamla.process import processor

    rows = "\n".join(lines[machine.name] for machine in MACHINES if machine.name in lines)
    where = f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {version('torch')}"
    return f"""
The suite on machines that this one can play, written by `make test-machines`: {where}. "What computes": without
the tests of data, command line, launchers and faults, which compute nothing of their own, where only instructions or
threads are limited. Several hundred tests are skipped for want of a CUDA device; they say so.

| machine | what is set | threads | tests | found | seconds | on |
|---|---|---|---|---|---|---|
{rows}

`python -m tests.machines WORDS` plays those whose name or settings have these words. Interpreters are looked for on the
PATH; each pair of Python and torch gets an environment under `.venv-machines` (gigabytes where torch brings CUDA).
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
