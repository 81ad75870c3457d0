"""Prefill and greedy decoding of one sequence in fp32: ours against `generate` of transformers.

Prefill is the time to the first new token. The decode rate is from the median time between later tokens, over all
rounds. State bytes are those of live tensors: our state, their cache.
"""

import time
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.contenders import DEEPSEEK_V3, GPT2, INT8, QUICK, QWEN3_NEXT, Ours, Shape, Transformers, contender
from benchmarks.running import Bench, Maker
from benchmarks.tables.training import HYBRIDS, OURS
from swamla.bench.measuring import Timing
from swamla.bench.results import Row

TABLE = "generation"
ROUNDED = tuple(f"{name}{INT8}" for name in HYBRIDS)
EVERYONE = (GPT2, DEEPSEEK_V3, QWEN3_NEXT, *OURS, *ROUNDED)


@dataclass(frozen=True, kw_only=True)
class Race:
    """One prompt length: new tokens, contenders, most rounds, and seconds after which no further round starts."""

    prompt: int
    count: int
    names: tuple[str, ...] = EVERYONE
    rounds: int = 1
    limit: float = 0.0


PLAN = (
    Race(prompt=128, count=96, rounds=7, limit=20.0),
    Race(prompt=2048, count=64, rounds=3, limit=20.0),
    Race(prompt=8192, count=64, rounds=2, limit=45.0),
    Race(prompt=32768, count=16, names=(GPT2, *HYBRIDS)),
)
QUICK_PLAN = (Race(prompt=24, count=3), Race(prompt=48, count=3, names=(GPT2, *HYBRIDS)))


class Reading:
    """Prefill and decoding of a contender, and their times."""

    def __init__(self, contender: Ours | Transformers, prompt: int, count: int) -> None:
        self.contender = contender
        self.prompt, self.count = [1] * prompt, count
        self.first_s: list[float] = []
        self.between_s: list[float] = []
        self.state_bytes = 0

    def __call__(self) -> None:
        stamps = [time.perf_counter()]
        self.state_bytes = self.contender.generate(self.prompt, self.count, lambda: stamps.append(time.perf_counter()))
        gaps = [after - before for before, after in pairwise(stamps)]
        self.first_s.append(gaps[0])
        self.between_s += gaps[1:]

    @property
    def first(self) -> Timing:
        """Time to the first new token."""
        return Timing.of(self.first_s)

    @property
    def between(self) -> Timing:
        """Time between tokens."""
        return Timing.of(self.between_s)

    def row(self) -> Row:
        """The figures of its row."""
        first, between = self.first, self.between
        return {
            "prefill_tokens_per_s": len(self.prompt) / first.median,
            "decode_tokens_per_s": 1 / between.median,
            "state_bytes": self.state_bytes,
            "prefill_s": first.median,
            "prefill_low_s": first.low,
            "prefill_high_s": first.high,
            "token_s": between.median,
            "token_low_s": between.low,
            "token_high_s": between.high,
            "rounds": first.rounds,
        }


def measure(bench: Bench) -> None:
    """The table, prompt length by prompt length."""
    shape = QUICK if bench.quick else Shape()
    for race in QUICK_PLAN if bench.quick else PLAN:
        measure_race(bench, race, shape)
        left_out = tuple(name for name in EVERYONE if name not in race.names)
        bench.leave_out(TABLE, {"prompt": race.prompt}, left_out, "too slow at this length for the time there is")


def measure_race(bench: Bench, race: Race, shape: Shape) -> None:
    """The rows of one prompt length; the baseline is GPT-2's decode rate."""
    prompt, count = race.prompt, race.count
    readings: dict[str, Reading] = {}

    def maker(name: str) -> Maker:
        def make() -> Reading:
            found = contender(name, shape, prompt + count)
            found.model.eval()
            Reading(found, 8, 2)()  # warm-up
            readings[name] = Reading(found, prompt, count)
            return readings[name]

        return make

    makers = {name: maker(name) for name in race.names}
    what: Row = {"prompt": prompt}
    outcomes = bench.race(TABLE, what, makers, rounds=race.rounds, limit=race.limit, warmup=0)
    baseline = readings[GPT2].between.median if GPT2 in outcomes else None
    for name in outcomes:
        ratio = baseline and baseline / readings[name].between.median
        bench.results.add(TABLE, {"name": name, **what, "new_tokens": count, "ratio": ratio, **readings[name].row()})
