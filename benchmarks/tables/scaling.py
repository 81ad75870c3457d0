"""The cost of a step of `swa swa mla` by length, width, depth and number of experts."""

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.contenders import QUICK, Ours, Shape
from benchmarks.running import Bench, Maker
from benchmarks.tables.training import training_step
from swamla.bench.measuring import Run
from swamla.bench.results import Row
from swamla.model import LanguageModelConfig, LatentMoEConfig, count_parameters

TABLE = "scaling"
PATTERN = "swa swa mla"
LENGTHS = (512, 1024, 2048, 4096, 8192)
WIDTHS = (128, 256, 384, 512, 768)
DEPTHS = (3, 6, 9, 12)
EXPERTS = (0, 8, 32, 128)
STEP = 1024  # tokens of a step; for lengths, a step is one row
ROUNDS, LIMIT = 7, 9.0

Point = tuple[int, LanguageModelConfig, int]  # the value along the axis, the model, tokens of a step


def axes(shape: Shape, quick: bool) -> Iterator[tuple[str, list[Point]]]:
    """Every axis with its points; two points each if quick."""
    step = 32 if quick else STEP
    lengths = (32, 64) if quick else LENGTHS
    widths = (96, 192) if quick else WIDTHS
    yield "length", [(length, shape.config(PATTERN), length) for length in lengths]
    yield "width", [(width, _wide(shape, width).config(PATTERN), step) for width in widths]
    depths = DEPTHS[:2] if quick else DEPTHS
    yield "depth", [(depth, replace(shape, depth=depth).config(PATTERN), step) for depth in depths]
    experts = EXPERTS[:2] if quick else EXPERTS
    yield "experts", [(count, shape.config(PATTERN, _experts(shape, count)), step) for count in experts]


def _wide(shape: Shape, width: int) -> Shape:
    """The shape at another width, with heads of the same width."""
    return replace(shape, width=width, heads=width // shape.head)


def _experts(shape: Shape, count: int) -> LatentMoEConfig | None:
    """A LatentMoE of `count` experts, 8 of them active, with about equal active parameters; None for 0."""
    return LatentMoEConfig(n_experts=count, n_activated=8, ratio=4) if count else None


def measure(bench: Bench) -> None:
    """The table, axis by axis; the points of an axis run alternately."""
    shape = QUICK if bench.quick else Shape()
    for axis, points in axes(shape, bench.quick):
        what: Row = {"axis": axis}
        makers = {f"{axis} {value}": _maker(config, tokens) for value, config, tokens in points}
        outcomes = bench.race(TABLE, what, makers, rounds=ROUNDS, limit=LIMIT)
        for value, config, tokens in points:
            outcome = outcomes.get(f"{axis} {value}")
            if outcome is not None:
                count = count_parameters(config)
                row: Row = {
                    "name": f"{axis} {value}",
                    **what,
                    "value": value,
                    "parameters": count.total,
                    "active_parameters": count.active,
                    "step_tokens": tokens,
                    "tokens_per_s": tokens / outcome.timing.median,
                    "peak_bytes": outcome.peak_bytes,
                }
                bench.results.add(TABLE, {**row, **outcome.row()})


def _maker(config: LanguageModelConfig, tokens: int) -> Maker:
    def make() -> Run:
        return training_step(Ours(PATTERN, config), config.vocab_size, 1, tokens)

    return make
