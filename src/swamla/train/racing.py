"""Measure once per machine which of several equivalent code paths is the fastest on its CPU; results are cached.

The ranking differs between machines: one attention path is twice as fast as another here and half as fast there. So
"auto" is decided by a short race on the model's own shapes. The default path is replaced only if it loses clearly, so
that noise in a race does not make two runs differ.
"""

import hashlib
import json
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from swamla.data.config import default_cache_dir
from swamla.errors import CorruptError
from swamla.files import read_json, write_text_atomically
from swamla.process import processor

SECONDS = 2.0  # about, for all races of a model together
CLEAR = 0.95  # a challenger wins if its median time is below this share of the default's
ROUNDS, ENOUGH = 9, 3  # most rounds; fewest rounds after which a challenger can win
SHORTEST, LONGEST = 64, 4096  # document lengths that are raced; longer ones rank as the longest
PARTS = (1, 4, 16, 64)  # a slow machine races 1/n of the rows and heads, before it shortens the documents
LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")  # restrict a CPU's instructions
UNITS = {"AVX512-BF16": torch.cpu._is_avx512_bf16_supported, "AMX": torch.cpu._is_amx_tile_supported}

Seconds = dict[str, list[float]]  # path → its time in each round
_clock = time.perf_counter


class Trial(Protocol):
    """A computation that several paths can do. Its `str` names it with its shapes; equal names are raced once."""

    def paths(self, dtype: torch.dtype) -> tuple[str, ...]:
        """The equivalent paths, the default first."""

    def scores(self, length: int, part: int) -> int:
        """A number that the time of a step is roughly proportional to."""

    def step(self, path: str, length: int, dtype: torch.dtype, part: int = 1) -> Callable[[], object]:
        """A forward and backward pass over documents of `length` tokens, with about 1/`part` of the usual rows."""


T = TypeVar("T", bound=Trial)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The result of a race.

    seconds: path → median time of a forward and backward pass over `rounds`, the default first.
    length: the document length that the choice is for.  raced: the length that was raced, shorter on a slow machine.
    dtype: of the inputs, "" if the paths differ in dtype.
    """

    what: str
    length: int
    raced: int
    dtype: str
    chosen: str
    seconds: dict[str, float]
    rounds: int

    @property
    def shape(self) -> str:
        """As text: "attention causal, 6 heads, width 64, documents of about 512, bfloat16"."""
        if not self.dtype:
            return self.what
        raced = "" if self.raced == self.length else f" (timed on {self.raced})"
        return f"{self.what}, documents of about {self.length}{raced}, {self.dtype}"

    def __str__(self) -> str:
        if self.rounds < ENOUGH:
            return (
                f"{self.shape}: {self.chosen}, the default: the machine is too busy to tell, the next run tries again"
            )
        ratios = {path: took / self.seconds[self.chosen] for path, took in self.seconds.items() if path != self.chosen}
        return f"{self.shape}: {self.chosen}, " + ", ".join(
            f"{r:.2f} times as fast as {path}" for path, r in ratios.items()
        )


def races_on(device: torch.device) -> bool:
    """True on a CPU, unless SWAMLA_MEASURE=0 is set. Elsewhere "auto" is the default path, unmeasured."""
    return device.type == "cpu" and os.environ.get("SWAMLA_MEASURE") != "0"


def choose(trials: set[T], dtype: torch.dtype | None, *, length: int) -> dict[T, Choice]:
    """The choice of every trial, from the cache or by a race.

    dtype: of the inputs; None if the paths differ in dtype.
    """
    kept = {trial: kept_choice(trial, dtype, length=length) for trial in sorted(trials, key=str)}
    found = {trial: choice for trial, choice in kept.items() if choice is not None}
    missing = [trial for trial in kept if trial not in found]
    name, dtype, length = _name(dtype), dtype or torch.float32, _rounded(length)
    deadline = _clock() + SECONDS
    for index, trial in enumerate(missing):
        allowance = max(0.0, deadline - _clock()) / (len(missing) - index)
        raced, seconds = measure(trial, length, dtype, allowance)
        medians = {path: statistics.median(rounds) for path, rounds in seconds.items()}
        found[trial] = Choice(
            what=str(trial),
            length=length,
            raced=raced,
            dtype=name,
            chosen=winner(seconds),
            seconds=medians,
            rounds=min(len(rounds) for rounds in seconds.values()),
        )
    if decided := [found[trial] for trial in missing if found[trial].rounds >= ENOUGH]:
        keep(decided)
    return found


def kept_choice(trial: Trial, dtype: torch.dtype | None, *, length: int) -> Choice | None:
    """The cached choice of a trial on this machine; None if its race had too few rounds, or other paths."""
    choice = kept_choices().get((str(trial), _rounded(length), _name(dtype)))
    if choice is None or choice.rounds < ENOUGH or tuple(choice.seconds) != trial.paths(dtype or torch.float32):
        return None
    return choice


def _rounded(length: int) -> int:
    return 2 ** round(math.log2(min(max(length, SHORTEST), LONGEST)))


def _name(dtype: torch.dtype | None) -> str:
    return "" if dtype is None else str(dtype).removeprefix("torch.")


def winner(seconds: Seconds) -> str:
    """The default, which is the first path, unless another one is clearly faster.

    Times are compared as ratios within rounds: the median ratio must be below `CLEAR`, after at least `ENOUGH` rounds,
    of which three in four must agree on which path is faster.
    """
    default, *challengers = seconds
    if len(seconds[default]) < ENOUGH:
        return default
    best, best_ratio = default, CLEAR
    for path in challengers:
        ratios = sorted(mine / its for mine, its in zip(seconds[path], seconds[default], strict=True))
        agreed = ratios[-1 - len(ratios) // 4] < 1
        if agreed and statistics.median(ratios) < best_ratio:
            best, best_ratio = path, statistics.median(ratios)
    return best


def measure(trial: Trial, length: int, dtype: torch.dtype, allowance: float) -> tuple[int, Seconds]:
    """Time the paths alternately (A B A B …), for up to `ROUNDS` rounds within `allowance` seconds.

    A slow machine races fewer rows and heads, then shorter documents. Returns their length, and the times.
    """
    begin, paths = _clock(), trial.paths(dtype)
    # Warm-up: a short round, because a process loads its kernels at their first use.
    _round({path: trial.step(path, SHORTEST, dtype, PARTS[-1]) for path in paths})
    (once,) = _round({paths[0]: trial.step(paths[0], length, dtype, PARTS[-1])}).values()
    score = once / trial.scores(length, PARTS[-1])
    left = allowance - (_clock() - begin)
    sizes = [(length >> halved, part) for halved in range(1 + int(math.log2(length / SHORTEST))) for part in PARTS]
    in_time = (size for size in sizes if score * trial.scores(*size) * len(paths) * (ENOUGH + 1) <= left)
    length, part = next(in_time, sizes[-1])
    steps = {path: trial.step(path, length, dtype, part) for path in paths}
    rounds = [_round(steps)]
    while len(rounds) <= ROUNDS and _clock() - begin + sum(rounds[-1].values()) < allowance:
        rounds.append(_round(steps))
    timed = rounds[1:] if len(rounds) > ENOUGH else rounds  # the first round is often slower
    return length, {path: [took[path] for took in timed] for path in steps}


def _round(steps: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    took = {}
    for path, step in steps.items():
        begin = _clock()
        step()
        took[path] = _clock() - begin
    return took


def kept_choices() -> dict[tuple[str, int, str], Choice]:
    """The cached choices of this machine, with its limits, threads and torch; empty if the file is unreadable."""
    file = _file()
    try:
        plain = read_json(file, inside=file.parent)
    except (CorruptError, OSError):
        return {}
    choices = plain.get("choices")
    return {
        (choice.what, choice.length, choice.dtype): choice
        for entry in (choices if isinstance(choices, list) else [])
        if (choice := _choice(entry)) is not None
    }


def _choice(plain: Any) -> Choice | None:
    try:
        choice = Choice(**plain)
    except TypeError:  # other fields, e.g. from another version
        return None
    whole = all(isinstance(number, int) for number in (choice.length, choice.raced, choice.rounds))
    named = all(isinstance(name, str) for name in (choice.what, choice.dtype, choice.chosen))
    if not (whole and named and isinstance(choice.seconds, dict) and choice.chosen in choice.seconds):
        return None
    return choice if all(isinstance(took, float) and took > 0 for took in choice.seconds.values()) else None


def keep(choices: list[Choice]) -> None:
    """Add choices to the cache. If it cannot be written, a warning says that the next run will race again."""
    file = _file()
    now = kept_choices() | {(choice.what, choice.length, choice.dtype): choice for choice in choices}
    plain = {"machine": describe_cpu(), "choices": [asdict(choice) for choice in now.values()]}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(file, json.dumps(plain, indent=2) + "\n")
    except OSError as error:
        message = f"{file}: cannot store which paths are fast here ({error.strerror}): the next run measures them again"
        warnings.warn(message, stacklevel=2)


def forget_choices() -> None:
    """Delete this machine's cached choices. If that fails, a warning says so."""
    try:
        _file().unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"{_file()}: cannot be removed ({error.strerror}), so its choices still apply", stacklevel=2)


def _file() -> Path:
    machine = hashlib.sha256(json.dumps(describe_cpu(), sort_keys=True).encode()).hexdigest()
    return default_cache_dir() / "paths" / f"{machine[:16]}.json"


def describe_cpu() -> dict[str, Any]:
    """The processor, the instructions that torch may use, the number of threads, and torch's version."""
    units = [name for name, there in UNITS.items() if there()]
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if os.environ.get(name)]
    return {
        "processor": processor(),
        "instructions": " ".join([torch.backends.cpu.get_cpu_capability(), *units, *limits]),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def describe_machine() -> dict[str, str]:
    """The same in words, with the versions of Python and of the system, which decide no bits: to be shown."""
    found = {name: str(value) for name, value in describe_cpu().items()}
    return found | {"Python": platform.python_version(), "system": platform.platform()}
