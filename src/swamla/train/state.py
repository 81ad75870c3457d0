"""The training state: all that a resumed run needs to continue to the bit."""

import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from swamla import distributed
from swamla.checkpoint import Checkpoint, load_into
from swamla.errors import CorruptError, UsageError
from swamla.model.adapters import is_adapter
from swamla.model.language_model import LanguageModel
from swamla.train.ema import WeightAverage
from swamla.train.optim import NamedOptimizer
from swamla.train.parallel.strategy import Strategy
from swamla.train.precision import Chosen

MEMORY = 100  # steps that the running mean of losses averages over, older ones with decaying weights
ENOUGH = 20  # losses seen before any counts as a spike

COUNTERS = (
    "step",
    "sample",
    "tokens",
    "seconds",
    "skipped",
    "skipped_in_a_row",
    "evaluated_at",
    "evaluated_step",
    "best_step",
    "best_loss",
)


@dataclass
class UsualLoss:
    """Running mean of about the last hundred losses, in nats per token, to detect spikes. count: losses seen."""

    mean: float = 0.0
    count: int = 0

    def __str__(self) -> str:
        return f"{self.mean:.4f}"

    def exceeds(self, loss: float, factor: float) -> bool:
        """True for a loss above `factor` times the mean, once `ENOUGH` losses were seen."""
        return self.count >= ENOUGH and loss > factor * self.mean

    def note(self, loss: float) -> None:
        """Add the loss of a step that was no spike."""
        self.count += 1
        self.mean += (loss - self.mean) / min(self.count, MEMORY)

    def plain(self) -> dict[str, Any]:
        """As JSON data, which restores the floats to the bit."""
        return {"mean": self.mean, "count": self.count}

    @classmethod
    def of(cls, plain: Any) -> Self:
        """Inverse of `plain`. None, from an older checkpoint, gives a new mean."""
        match plain:
            case None:
                return cls()
            case {"mean": float(mean), "count": int(count)}:
                return cls(mean, count)
        raise CorruptError(f"state.json: damaged: the usual loss is {plain!r}")


@dataclass(kw_only=True)
class TrainState:
    """The state of a training run. A checkpoint holds all of it, and the states of the random generators.

    backends: op → the backend that computes it.  paths: block → the backend that was chosen by measurement.
    machine: hardware and versions, see `describe_machine`.  notes, measured: other choices and
    the measurements that were made for them, a line each, to be printed.
    initialized_from: the run or folder that a new run took its weights from.
    average: the moving average of the weights, if the run has one; evaluations score it.
    step: optimizer steps taken, skipped ones included.  sample: index of the next row, the position in the data.
    tokens: labels trained on.  seconds: training time, evaluations and saves included.
    skipped, skipped_in_a_row: steps whose gradient was not finite.
    evaluated_at, evaluated_step: `seconds` and `step` at the last evaluation.
    best_step, best_loss: the lowest held-out loss so far, in nats per token.  scored_by: the settings it depends on.
    usual: the running mean of losses that spikes are detected by.
    """

    strategy: Strategy
    optimizer: NamedOptimizer
    precision: Chosen
    backends: dict[str, str]
    data_fingerprint: str
    device: torch.device
    machine: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    measured: tuple[str, ...] = ()
    initialized_from: dict[str, Any] | None = None
    average: WeightAverage | None = None
    step: int = 0
    sample: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    evaluated_at: float = 0.0
    evaluated_step: int | None = None
    best_step: int | None = None
    best_loss: float | None = None
    scored_by: dict[str, Any] = field(default_factory=dict)
    usual: UsualLoss = field(default_factory=UsualLoss)

    @property
    def model(self) -> LanguageModel:
        """The model; its parameters may be sharded."""
        return self.strategy.model

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors of the state, by group of a checkpoint. Not copies: the next step changes them."""
        whole = self.model.state_dict(keep_vars=True)
        tensors = {
            "model": {name: tensor for name, tensor in whole.items() if not is_adapter(name)},
            "optimizer": self.optimizer.state_tensors(),
            "rng": generator_states(),
        }
        if adapters := {name: tensor for name, tensor in whole.items() if is_adapter(name)}:
            tensors["adapters"] = adapters
        if self.average is not None:
            tensors["ema"] = self.average.tensors()
        return tensors

    def plain(self) -> dict[str, Any]:
        """The rest of the state, as JSON data."""
        return {name: getattr(self, name) for name in COUNTERS} | {
            "scored_by": self.scored_by,
            "usual_loss": self.usual.plain(),
            "precision": self.precision,
            "backends": self.backends,
            "paths": self.paths,
            "machine": self.machine,
            "data_fingerprint": self.data_fingerprint,
            "parameters_without_optimizer_state": self.optimizer.stateless(),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore everything in `checkpoint`, the process's random generators included.

        Raises `CorruptError` if anything is missing; warns if other backends computed it.
        """
        file, saved = checkpoint.path / "state.json", checkpoint.state
        if saved.get("weights_only"):
            raise UsageError(f"{checkpoint.path}: holds converted weights only: it cannot be resumed")
        missing = {*COUNTERS, "precision", "backends", "parameters_without_optimizer_state"} - saved.keys()
        if missing:
            raise CorruptError(f"{file}: damaged: has no {', '.join(sorted(missing))}")
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        load_into(self.model, _weights(checkpoint, parameters), origin=str(checkpoint.path))
        self.optimizer.load_state_tensors(
            checkpoint.tensors("optimizer", like=lambda name: parameters.get(name.rpartition("/")[0])),
            stateless=saved["parameters_without_optimizer_state"],
            origin=str(checkpoint.path),
        )
        if self.average is not None:
            self.average.load(checkpoint.tensors("ema", like=parameters.get), origin=str(checkpoint.path))
        for name in COUNTERS:
            setattr(self, name, saved[name])
        self.usual = UsualLoss.of(saved.get("usual_loss"))  # older checkpoints lack this, and the next
        self.scored_by = saved.get("scored_by", self.scored_by)
        self.precision = saved["precision"]
        if saved["backends"] != self.backends:
            warnings.warn(f"backends changed: {saved['backends']} before, {self.backends} from here on", stacklevel=2)
        set_generator_states(checkpoint.tensors("rng"))

    def go_back(self, checkpoint: Checkpoint) -> int:
        """Restore weights and optimizer from `checkpoint`; steps, rows, time and random generators go on.

        The steps since the checkpoint count as skipped. Returns the first row that it was not trained on.
        """
        now = {name: getattr(self, name) for name in COUNTERS if name not in ("tokens", "skipped")}
        usual, scored_by, generators = self.usual, self.scored_by, generator_states()
        self.restore(checkpoint)
        set_generator_states(generators)
        first, updates = self.sample, self.updates
        for name, value in now.items():
            setattr(self, name, value)
        self.usual, self.scored_by, self.skipped = usual, scored_by, self.step - updates
        self.skipped_in_a_row += 1
        return first

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and held-out loss of the best evaluation so far."""
        return None if self.best_step is None or self.best_loss is None else (self.best_step, self.best_loss)

    @property
    def updates(self) -> int:
        """Steps that changed the weights."""
        return self.step - self.skipped

    def evaluated_weights(self) -> AbstractContextManager[None]:
        """Context in which the model has the weights that evaluations score: the averages, if there are any."""
        return nullcontext() if self.average is None else self.average.in_place()

    @contextmanager
    def weights_of(self, checkpoint: Checkpoint) -> Iterator[None]:
        """Context in which the model has the weights that an evaluation at `checkpoint` scored."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        own = {name: distributed.local(t.detach()).clone() for name, t in self.model.state_dict().items()}
        weights = _weights(checkpoint, parameters)
        if checkpoint.has("ema"):
            weights |= checkpoint.tensors("ema", like=parameters.get)
        load_into(self.model, weights, origin=str(checkpoint.path))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in self.model.state_dict().items():
                    distributed.local(tensor).copy_(own[name])

    def weights_are_finite(self) -> bool:
        """False if any weight on any rank is infinite or NaN."""
        finite = all(bool(distributed.local(p).isfinite().all()) for p in self.model.parameters())
        return not distributed.highest(not finite)


def _weights(checkpoint: Checkpoint, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights, buffers and adapters of a checkpoint, apart, each sharded like the model's own."""
    groups = ("model", "adapters") if checkpoint.has("adapters") else ("model",)
    return {name: t for group in groups for name, t in checkpoint.tensors(group, like=like.get).items()}


def seed_generators(seed: int) -> None:
    """Seed the global random generators of torch, Python and numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def generator_states() -> dict[str, Tensor]:
    """The states of the global random generators of torch, Python and numpy, as tensors."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words]),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray([*keys, position, has_gauss], dtype=np.int64)),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    for index in range(torch.cuda.device_count()):
        states[f"cuda{index}"] = torch.cuda.get_rng_state(index)
    return states


def set_generator_states(states: Mapping[str, Tensor]) -> None:
    """Restore what `generator_states` returned; states of devices that are absent here are ignored."""
    torch.set_rng_state(states["torch"])
    version, *words = states["python"].tolist()
    gauss = states["python_gauss"].item()
    random.setstate((version, tuple(words), None if gauss != gauss else gauss))
    *keys, position, has_gauss = states["numpy"].tolist()
    key_array = np.asarray(keys, dtype=np.uint32)
    np.random.set_state(("MT19937", key_array, position, has_gauss, states["numpy_gauss"].item()))
    for index in range(torch.cuda.device_count()):
        if f"cuda{index}" in states:
            torch.cuda.set_rng_state(states[f"cuda{index}"], index)
