"""Which of several equal paths of a CPU is the fastest: raced once a machine, and kept there.

What is fast on one machine is slow on another: of two attentions the same one is half as fast and twice as fast as the
other. So "auto" is decided by a short race on shapes of the model's own. The default has to lose clearly, so that a
disturbed race does not make two runs differ.
"""

import hashlib
import json
import math
import os
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

SECONDS = 2.0  # that all races of a model may take together, about
CLEAR = 0.95  # of the default's time: what a challenger may take at most, in the median of the rounds
ROUNDS, ENOUGH = 9, 3  # at most, and to prefer another path than the default
SHORTEST, LONGEST = 64, 4096  # documents that are raced over: longer ones differ as these do
PARTS = (1, 4, 16, 64)  # of the rows and heads of a trial, on a slow machine, before documents are shortened
LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")  # what a user may hold a CPU down by
UNITS = {"AVX512-BF16": torch.cpu._is_avx512_bf16_supported, "AMX": torch.cpu._is_amx_tile_supported}

Seconds = dict[str, list[float]]  # path → what it took in each round
_clock = time.perf_counter


class Trial(Protocol):
    """What is raced. `str` names it, shapes included; trials of equal names are raced once."""

    def paths(self, dtype: torch.dtype) -> tuple[str, ...]:
        """Paths that compute the same, the default first."""

    def scores(self, length: int, part: int) -> int:
        """What the time of a trial grows with."""

    def step(self, path: str, length: int, dtype: torch.dtype, part: int = 1) -> Callable[[], object]:
        """A forward and backward pass over documents of `length` tokens, of about one in `part` of the usual rows."""


T = TypeVar("T", bound=Trial)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a race found. seconds: of a forward and backward pass, by path, medians of `rounds`; the default's first.

    length: of documents, for which it is the choice.  raced: of those that it raced over, fewer on a slow machine.
    dtype: of what is computed, "" where that is what was raced.
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
        """For people: "attention causal, 6 heads, width 64, documents of about 512, bfloat16"."""
        if not self.dtype:
            return self.what
        raced = "" if self.raced == self.length else f" (raced over {self.raced})"
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
    """False where "auto" is the default unmeasured: on devices other than a CPU, or where SWAMLA_MEASURE=0 is set."""
    return device.type == "cpu" and os.environ.get("SWAMLA_MEASURE") != "0"


def choose(trials: set[T], dtype: torch.dtype | None, *, length: int) -> dict[T, Choice]:
    """The choice of every trial: what the cache has kept of this machine, the others raced. dtype: of the inputs.

    None where the paths are formats themselves, from inputs in fp32.
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
    """What the cache has kept of a trial on this machine; None where that decided nothing, or is of other paths."""
    choice = kept_choices().get((str(trial), _rounded(length), _name(dtype)))
    if choice is None or choice.rounds < ENOUGH or tuple(choice.seconds) != trial.paths(dtype or torch.float32):
        return None
    return choice


def _rounded(length: int) -> int:
    return 2 ** round(math.log2(min(max(length, SHORTEST), LONGEST)))


def _name(dtype: torch.dtype | None) -> str:
    return "" if dtype is None else str(dtype).removeprefix("torch.")


def winner(seconds: Seconds) -> str:
    """The default, which is the first, unless another one is clearly faster: by the ratios within rounds.

    Their median must be below `CLEAR`, and of `ENOUGH` rounds at least three in four must agree on who is faster.
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
    """What each path takes, in turns (A B A B …), in as many of `ROUNDS` as `allowance` seconds have room for.

    A slow machine races fewer rows and heads, then shorter documents, whose length is returned too.
    """
    begin, paths = _clock(), trial.paths(dtype)
    # A short round first, for what a process does once, as loading kernels.
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
    timed = rounds[1:] if len(rounds) > ENOUGH else rounds  # the first one is often slower
    return length, {path: [took[path] for took in timed] for path in steps}


def _round(steps: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    took = {}
    for path, step in steps.items():
        begin = _clock()
        step()
        took[path] = _clock() - begin
    return took


def kept_choices() -> dict[tuple[str, int, str], Choice]:
    """What was raced on this machine, with these limits, threads and torch; what cannot be read counts as not there."""
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
    except TypeError:  # no such fields
        return None
    whole = all(isinstance(number, int) for number in (choice.length, choice.raced, choice.rounds))
    named = all(isinstance(name, str) for name in (choice.what, choice.dtype, choice.chosen))
    if not (whole and named and isinstance(choice.seconds, dict) and choice.chosen in choice.seconds):
        return None
    return choice if all(isinstance(took, float) and took > 0 for took in choice.seconds.values()) else None


def keep(choices: list[Choice]) -> None:
    """Add to what is kept. Where nothing can be written, a warning says that the next run will race again."""
    file = _file()
    now = kept_choices() | {(choice.what, choice.length, choice.dtype): choice for choice in choices}
    plain = {"machine": describe_cpu(), "choices": [asdict(choice) for choice in now.values()]}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(file, json.dumps(plain, indent=2) + "\n")
    except OSError as error:
        told = f"{file}: cannot keep which paths are fast here ({error.strerror}): they are measured again next time"
        warnings.warn(told, stacklevel=2)


def forget_choices() -> None:
    """Let everything be raced anew on this machine; a warning says where what was kept cannot be removed."""
    try:
        _file().unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"{_file()}: cannot be removed ({error.strerror}), so it still counts", stacklevel=2)


def _file() -> Path:
    machine = hashlib.sha256(json.dumps(describe_cpu(), sort_keys=True).encode()).hexdigest()
    return default_cache_dir() / "paths" / f"{machine[:16]}.json"


def describe_cpu() -> dict[str, Any]:
    """The processor, the instructions that torch may use, how many threads, and torch's version."""
    units = [name for name, there in UNITS.items() if there()]
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if os.environ.get(name)]
    return {
        "processor": processor(),
        "instructions": " ".join([torch.backends.cpu.get_cpu_capability(), *units, *limits]),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
