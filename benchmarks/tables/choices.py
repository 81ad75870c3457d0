"""The effect of settings on `swa swa mla` with rows of 1024 tokens: precision, rows, threads, checkpointing."""

from collections.abc import Iterator
from contextlib import nullcontext

import torch

from benchmarks.contenders import QUICK, Ours, Shape
from benchmarks.running import Bench, Maker
from swamla.bench.measuring import Run
from swamla.bench.results import Row
from swamla.model.block import Checkpointing

TABLE = "choices"
PATTERN = "swa swa mla"
LENGTH = 1024
ROWS = 4  # unless rows are varied
ROUNDS, LIMIT = 5, 16.0

CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "attention", "ffn", "all")


def axes(threads: int, quick: bool) -> Iterator[tuple[str, dict[str, dict[str, object]]]]:
    """Every setting with its values: label in the table → arguments of `_maker`."""
    yield "precision", {name: {"precision": name} for name in ("fp32", "bf16")}
    yield "rows of a step", {str(rows): {"rows": rows} for rows in ((1, 2) if quick else (1, 2, 4, 8, 16))}
    yield "threads", {str(count): {"threads": count} for count in range(1, threads + 1)}
    yield "checkpointing", {what: {"checkpointing": what} for what in CHECKPOINTING}


def measure(bench: Bench) -> None:
    """The table, setting by setting; the values of a setting run alternately."""
    threads = torch.get_num_threads()
    for axis, values in axes(threads, bench.quick):
        what: Row = {"axis": axis}
        makers = {name: _maker(bench.quick, **{"threads": threads, **chosen}) for name, chosen in values.items()}
        for name, outcome in bench.race(TABLE, what, makers, rounds=ROUNDS, limit=LIMIT).items():
            tokens = int(name if axis == "rows of a step" else ROWS) * (32 if bench.quick else LENGTH)
            row: Row = {
                "name": name,
                **what,
                "step_tokens": tokens,
                "tokens_per_s": tokens / outcome.timing.median,
                "peak_bytes": outcome.peak_bytes,
            }
            bench.results.add(TABLE, {**row, **outcome.row()})
    torch.set_num_threads(threads)


def _maker(
    quick: bool, threads: int, rows: int = ROWS, precision: str = "bf16", checkpointing: Checkpointing = "none"
) -> Maker:
    def make() -> Run:
        shape, length = (QUICK, 32) if quick else (Shape(), LENGTH)
        model = Ours(PATTERN, shape.config(PATTERN))
        model.model.checkpoint_activations(checkpointing)
        optimizer = torch.optim.AdamW(model.model.parameters(), lr=1e-4, fused=True)
        tokens_BT, labels_BT = (torch.randint(shape.vocabulary, (rows, length)) for _ in range(2))

        def step() -> None:
            torch.set_num_threads(threads)
            with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
                loss = model.loss(tokens_BT, labels_BT)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step()  # creates the optimizer's moments
        return step

    return make
