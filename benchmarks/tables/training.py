"""Tokens per second of a training step: our models against those of other libraries of equal size, by length.

All use fused AdamW, bf16 autocast with fp32 weights, no compilation, and their own library's loss.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.contenders import (
    GPT2,
    NANOGPT,
    QUICK,
    TRANSFORMERS,
    Contender,
    Shape,
    contender,
)
from benchmarks.running import Bench, Maker, times_faster
from swamla.bench.measuring import Run
from swamla.bench.results import Row

TABLE = "training"
HYBRIDS = ("swa swa mla", "gdn gdn mla")
OURS = (*HYBRIDS, "mha", "mla")
FIVE_TO_ONE = "swa swa swa swa swa mla"
MATMUL, SIDE, MATMULS = "bf16 matmul", 1024, 100
QUICK_SIDE = 64  # of a dry run: without bf16 instructions the whole takes minutes
STEP = 4096  # tokens of a step, at least one row


@dataclass(frozen=True, kw_only=True)
class Race:
    """The contenders at one length.

    length: tokens of a row.
    names: of the contenders.
    left_out: contenders that would take too long.
    rounds: most rounds.
    limit: seconds after which no further round starts.
    warmup: untimed rounds.
    """

    length: int
    names: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    rounds: int = 9
    limit: float
    warmup: int = 1


def plan(nanogpt: bool, quick: bool) -> list[Race]:
    """All contenders at every length; above 8192, GPT-2 is the only one of transformers."""
    baseline = NANOGPT if nanogpt else GPT2
    everyone = (*dict.fromkeys((baseline, *OURS, *TRANSFORMERS)),)
    others = tuple(name for name in TRANSFORMERS if name != GPT2)
    few = (*dict.fromkeys((baseline, *OURS, GPT2)), FIVE_TO_ONE)
    if quick:
        return [
            Race(length=32, names=everyone, limit=0),
            Race(length=64, names=few, left_out=others, limit=0, warmup=0),
        ]
    races = [
        Race(length=256, names=everyone, limit=25),
        Race(length=1024, names=everyone, limit=45),
        Race(length=4096, names=everyone, limit=50),
        Race(length=8192, names=everyone, limit=40, rounds=2, warmup=0),
        Race(length=16384, names=few, left_out=others, limit=0, rounds=1, warmup=0),
    ]
    if nanogpt:
        races.append(Race(length=32768, names=(NANOGPT, *HYBRIDS), rounds=1, limit=0, warmup=0))
    return races


def measure(bench: Bench) -> None:
    """The table, race by race."""
    shape = QUICK if bench.quick else Shape()
    for race in plan(bench.nanogpt is not None, bench.quick):
        measure_race(bench, race, shape)


def measure_race(bench: Bench, race: Race, shape: Shape) -> None:
    """The rows of one length; the first contender is the baseline."""
    what: Row = {"length": race.length}
    rows = max(1, (64 if bench.quick else STEP) // race.length)
    built: dict[str, Contender] = {}

    def maker(name: str) -> Maker:
        def make() -> Run:
            built[name] = contender(name, shape, race.length, bench.nanogpt)
            return training_step(built[name], shape.vocabulary, rows, race.length)

        return make

    makers: dict[str, Maker] = {name: maker(name) for name in race.names}
    side = QUICK_SIDE if bench.quick else SIDE
    makers[MATMUL] = lambda: partial(matmuls, side)  # the machine's peak rate, in the same rounds
    outcomes = bench.race(TABLE, what, makers, rounds=race.rounds, limit=race.limit, warmup=race.warmup)
    if MATMUL not in outcomes:
        return
    reached = MATMULS * 2 * side**3 / outcomes.pop(MATMUL).timing.median
    baseline = outcomes.get(race.names[0])
    for name, outcome in outcomes.items():
        speed = rows * race.length / outcome.timing.median
        row: Row = {
            "name": name,
            **what,
            "rows": rows,
            "parameters": built[name].n_parameters,
            "tokens_per_s": speed,
            "ratio": times_faster(baseline, outcome),
            "bf16_share": speed * built[name].flops_per_token(race.length) / reached,
            "bf16_flops": reached,
            "peak_bytes": outcome.peak_bytes,
            **outcome.row(),
        }
        bench.results.add(TABLE, row)
    bench.leave_out(TABLE, what, race.left_out, "too slow at this length for the time there is")


def matmuls(side: int = SIDE) -> None:
    """Products of square bf16 matrices, about a quarter of a second."""
    a, b = (torch.randn(side, side).bfloat16() for _ in range(2))
    for _ in range(MATMULS):
        a @ b


def training_step(contender: Contender, vocabulary: int, rows: int, length: int) -> Run:
    """A step on random tokens. A first step, on a short row, has created the optimizer's moments."""
    model = contender.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(tokens_BT: Tensor, labels_BT: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = contender.loss(tokens_BT, labels_BT)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def drawn(rows: int, length: int) -> tuple[Tensor, Tensor]:
        return torch.randint(vocabulary, (rows, length)), torch.randint(vocabulary, (rows, length))

    step(*drawn(1, min(length, 32)))
    return partial(step, *drawn(rows, length))
