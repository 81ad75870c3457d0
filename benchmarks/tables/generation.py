"""Prefill and decode, one sequence, greedy, fp32 without autocast: ours against `generate` of transformers.

Prefill is the time to the first new token. The decode rate is of the tokens after it, the median of the times between
them over all rounds. State bytes are read off live tensors: our state, their cache.
"""

import time
from itertools import pairwise

from benchmarks.contenders import DEEPSEEK_V3, GPT2, INT8, QUICK, QWEN3_NEXT, Ours, Shape, Transformers, contender
from benchmarks.running import Bench, Maker
from benchmarks.tables.training import HYBRIDS, OURS
from swamla.bench.measuring import Timing
from swamla.bench.results import Row

TABLE = "generation"
ROUNDED = tuple(f"{name}{INT8}" for name in HYBRIDS)
EVERYONE = (GPT2, DEEPSEEK_V3, QWEN3_NEXT, *OURS, *ROUNDED)
# prompt, new tokens, contenders, rounds at most, seconds after which no further round begins
PLAN = (
    (128, 96, EVERYONE, 7, 20.0),
    (2048, 64, EVERYONE, 3, 20.0),
    (8192, 64, EVERYONE, 2, 45.0),
    (32768, 16, (GPT2, *HYBRIDS), 1, 0.0),
)
QUICK_PLAN = ((24, 3, EVERYONE, 1, 0.0), (48, 3, (GPT2, *HYBRIDS), 1, 0.0))


class Reading:
    """A contender that reads a prompt and writes on, and the times of it."""

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
        """Until the first new token."""
        return Timing.of(self.first_s)

    @property
    def between(self) -> Timing:
        """Between one token and the next."""
        return Timing.of(self.between_s)

    def row(self) -> Row:
        """Its figures."""
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
    """The table, prompt by prompt."""
    shape = QUICK if bench.quick else Shape()
    for prompt, count, names, rounds, limit in QUICK_PLAN if bench.quick else PLAN:
        measure_prompt(bench, shape, prompt, count, names, rounds, limit)
        left_out = tuple(name for name in EVERYONE if name not in names)
        bench.leave_out(TABLE, {"prompt": prompt}, left_out, "too slow at this length for the time there is")


def measure_prompt(
    bench: Bench, shape: Shape, prompt: int, count: int, names: tuple[str, ...], rounds: int, limit: float
) -> None:
    """The rows of one length of prompt; the baseline is GPT-2's decode rate."""
    readings: dict[str, Reading] = {}

    def maker(name: str) -> Maker:
        def make() -> Reading:
            found = contender(name, shape, prompt + count)
            found.model.eval()
            Reading(found, 8, 2)()  # what a first call sets up does not count
            readings[name] = Reading(found, prompt, count)
            return readings[name]

        return make

    makers = {name: maker(name) for name in names}
    what: Row = {"prompt": prompt}
    outcomes = bench.race(TABLE, what, makers, rounds=rounds, limit=limit, warmup=0)
    baseline = readings[GPT2].between.median if GPT2 in outcomes else None
    for name in outcomes:
        ratio = baseline and baseline / readings[name].between.median
        bench.results.add(TABLE, {"name": name, **what, "new_tokens": count, "ratio": ratio, **readings[name].row()})
