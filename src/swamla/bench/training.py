"""Measure a training step: time and its breakdown, memory, and share of the matmul rate."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median

from torch import Tensor

from swamla.bench.measuring import Run, interleaved, peak_memory, synchronize
from swamla.bench.results import Row
from swamla.bench.synthetic import whole_rows
from swamla.data.dataset import Dataset
from swamla.data.packing import Batch
from swamla.errors import UsageError
from swamla.model.accounting import TrainingFlops, count_parameters, training_flops_per_token
from swamla.ops.layout import Layout
from swamla.train.config import RunConfig, TrainConfig
from swamla.train.memory_advice import Place, training_bytes
from swamla.train.parallel.strategy import Found, Strategy
from swamla.train.state import TrainState
from swamla.train.step import training_step

STEPS = 3  # fewest steps of a measurement: one each for warm-up, time and memory
_ROUNDS = 20
_TIMED = 0.7  # share of the time; the rest is for the last round and the step that measures memory
_STEADY = 1e-3  # factor of the learning rate: the weights must stay finite on random tokens
_UPDATE_BYTES = 40  # about the bytes that an optimizer reads and writes per parameter


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of a step's batch.

    rows: number of rows.
    length: tokens of a row.
    accumulation: number of micro-batches.
    packed: rows of many documents from the loader; else each row is one document.
    """

    rows: int
    length: int
    accumulation: int = 1
    packed: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.rows * self.length

    def __str__(self) -> str:
        split = f" in {self.accumulation}" if self.accumulation > 1 else ""
        return f"{self.rows} × {self.length:,}{split}{' packed' if self.packed else ''}"

    def settings(self, train: TrainConfig) -> TrainConfig:
        """The recipe's training config with steps of this shape."""
        steady = replace(train, block_size=self.length, curriculum="", batch_ramp="")
        return replace(steady, batch_size=self.rows, accumulation=self.accumulation)

    def smaller(self) -> "Shape | None":
        """The next cheaper shape: fewer rows, no larger micro-batches; None for a single row."""
        if self.rows == 1:
            return None
        if self.accumulation > 1:
            return replace(self, rows=self.rows // self.accumulation, accumulation=1)
        return replace(self, rows=self.rows // 2)


def step_flops(config: RunConfig, shape: Shape) -> float:
    """Upper bound of a step's FLOPs by the accounting, with one document per row."""
    return shape.tokens * training_flops_per_token(config.model, shape.length)


def expected_seconds(config: RunConfig, shape: Shape, *, flops: float, copy_bytes: float) -> float:
    """Estimated seconds of a step at these FLOP/s in training and this copy rate."""
    update = _UPDATE_BYTES * count_parameters(config.model).total
    return step_flops(config, shape) / flops + update / copy_bytes


def expected_bytes(config: RunConfig, shape: Shape, place: Place) -> int:
    """Upper bound of the memory of such steps: the accounting's, with a margin for its estimate of activations."""
    needs = training_bytes(replace(config, train=shape.settings(config.train)), place)
    return round(sum(needs.values()) + 0.4 * needs["activations_estimate"])


def batch_of(shape: Shape, dataset: Dataset) -> Batch:
    """A batch of random tokens."""
    if shape.packed:
        return dataset.rows(shape.length, 0).batch(0, shape.rows)
    return Batch(*whole_rows(shape.rows, shape.length, dataset.tokenizer.vocab_size))


def measure_step(config: RunConfig, state: TrainState, batch: Batch, shape: Shape, *, peak: float, limit: float) -> Row:
    """Time and memory of a training step. peak: FLOP/s of a large matrix product in this precision.

    limit: seconds after which no further step starts, but at least `STEPS` run.
    """
    begin, settings = time.monotonic(), shape.settings(config.train)
    timed = TimedSteps(with_timers(state), settings, batch)
    timed.step()
    left = limit - (time.monotonic() - begin)
    contenders: dict[str, Run] = {"step": timed.step}
    if state.device.type == "cuda":  # the breakdown waits for the device, so the step's time is measured without it
        contenders = {"step": lambda: one_step(state, settings, batch), "breakdown": timed.step}
    timed.reset()
    timing = interleaved(contenders, rounds=_ROUNDS, warmup=0, limit=_TIMED * left)["step"]
    forward, backward, optimizer = map(median, (timed.forward, timed.backward, timed.optimizer))
    state.optimizer.zero_grad()
    memory = held_bytes(state) + peak_memory(timed.step)  # last, because it returns freed memory to the system
    flops = TrainingFlops(config.model).of(batch.document_BT)
    return {
        "name": str(shape),
        "rows": shape.rows,
        "length": shape.length,
        "tokens_per_s": batch.n_labels / timing.median,
        "matmul_share": flops / timing.median / peak,
        "median_s": timing.median,
        "low_s": timing.low,
        "high_s": timing.high,
        "rounds": timing.rounds,
        "forward_s": forward,
        "backward_s": backward,
        "optimizer_s": optimizer,
        "peak_bytes": memory,
        "flops": flops,
    }


def one_step(state: TrainState, settings: TrainConfig, batch: Batch) -> None:
    """A training step with a negligible learning rate. Raises `UsageError` if its numbers are not finite."""
    if not training_step(state, batch, settings, _STEADY * settings.lr).finite:
        raise UsageError("the loss of random tokens, or its gradient, is not finite, so the step skips the update")


def held_bytes(state: TrainState) -> int:
    """Bytes of weights, optimizer state and averaged weights; shared memory is counted once."""
    groups = state.tensors()
    del groups["rng"]
    storages = [tensor.untyped_storage() for group in groups.values() for tensor in group.values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@dataclass(frozen=True)
class TimedStrategy(Strategy):
    """The strategy for one process that times the passes. seconds: over the micro-batches since they were reset."""

    seconds: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "both": 0.0}, kw_only=True)

    def loss(self, tokens_BT: Tensor, labels_BT: Tensor, seq: Layout) -> Found:
        with self._timed("forward"):
            return super().loss(tokens_BT, labels_BT, seq)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        with self._timed("both"), super().micro_batch(last=last):
            yield

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        synchronize()
        begin = time.perf_counter()
        yield
        synchronize()
        self.seconds[phase] += time.perf_counter() - begin


def with_timers(state: TrainState) -> TrainState:
    """The same state and tensors, with a strategy that times the passes."""
    return replace(state, strategy=TimedStrategy(state.strategy.model, experts=state.strategy.experts))


class TimedSteps:
    """Training steps with a breakdown of their seconds: forward, backward, and the rest (the optimizer)."""

    def __init__(self, state: TrainState, settings: TrainConfig, batch: Batch) -> None:
        assert isinstance(state.strategy, TimedStrategy)
        self._state, self._settings, self._batch, self._seconds = state, settings, batch, state.strategy.seconds
        self.reset()

    def reset(self) -> None:
        """Discard the times so far."""
        self.forward: list[float] = []
        self.backward: list[float] = []
        self.optimizer: list[float] = []

    def step(self) -> None:
        """Take a step."""
        self._seconds.update(forward=0.0, both=0.0)
        synchronize()
        begin = time.perf_counter()
        one_step(self._state, self._settings, self._batch)
        synchronize()
        whole, forward, both = time.perf_counter() - begin, self._seconds["forward"], self._seconds["both"]
        self.forward.append(forward)
        self.backward.append(both - forward)
        self.optimizer.append(whole - both)
