"""Several torch optimizers seen as one, whose state is named by parameter so that it can be kept as safetensors."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from swamla import distributed
from swamla.errors import CorruptError
from swamla.registry import Registered
from swamla.train.precision import Chosen

EMBEDDINGS = frozenset({"embedding.weight", "positions.weight"})

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Held:
    """One tensor that an optimizer remembers of a parameter."""

    shape: Shape
    dtype: torch.dtype = torch.float32

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def zeros(self, device: torch.device) -> Tensor:
        """The tensor before the first step."""
        return torch.zeros(self.shape, dtype=self.dtype, device=device)


@dataclass(frozen=True, eq=False)
class Trained:
    """A parameter as an optimizer sees it.

    parameter: the model's, with its whole shape.  part: what this process holds and updates of it, sharing its memory:
    a plain tensor, the parameter itself where it is not sharded.
    """

    name: str
    parameter: nn.Parameter
    part: nn.Parameter

    @property
    def shape(self) -> Shape:
        """Of the whole."""
        return tuple(self.parameter.shape)

    def attach(self) -> None:
        """Let the part see the weights and the gradient as they are now."""
        if self.part is not self.parameter:
            gradient = self.parameter.grad
            self.part.data = distributed.local(self.parameter.detach())
            self.part.grad = None if gradient is None else distributed.local(gradient)

    def is_cut_like(self, state: Tensor) -> bool:
        """True for a tensor that holds a number for each of the part's, where that is not the whole."""
        return self.part is not self.parameter and state.ndim > 0 and state.shape == self.part.shape


NamedParameters = list[Trained]
Remembers = Callable[[str, Shape], Mapping[str, Held]]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Registered, home="swamla.train.optim"):
    """What the config of an optimizer has to offer."""

    @abstractmethod
    def build(
        self, model: nn.Module, *, lr: float, weight_decay: float, precision: Chosen = "fp32"
    ) -> "NamedOptimizer":
        """The optimizer of all trainable parameters of `model`.

        precision: of the run, in which products of the optimizer's own may be computed, too.
        """

    @abstractmethod
    def remembers(self, name: str, shape: Shape) -> Mapping[str, Held]:
        """What the optimizer remembers of a parameter of this name and shape once it was updated."""

    def coarser(self) -> Iterator[tuple[str, Self]]:
        """Flags that let the optimizer remember less, and the config that each leads to; none by default."""
        return iter(())

    def state_bytes(self, parameters: Iterable[tuple[str, Sequence[int]]]) -> int:
        """Bytes of the state of parameters with these names and shapes, each tensor's 4-byte step counter included."""
        return sum(held.nbytes for name, shape in parameters for held in self.remembers(name, tuple(shape)).values())


def named_parameters(model: nn.Module) -> NamedParameters:
    """The trainable parameters of a model, each once."""
    return [Trained(name, p, _part(p)) for name, p in model.named_parameters() if p.requires_grad]


def _part(p: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(distributed.local(p.detach())) if distributed.sharded(p) else p


def decays(name: str, shape: Sequence[int]) -> bool:
    """Weight decay pulls on what multiplies activations: matrices, stacks of them and the filters of convolutions.

    Not on embeddings, nor on vectors: gains, biases, A_log and dt_bias. A head that is tied is an embedding.
    """
    return len(shape) >= 2 and name not in EMBEDDINGS


def decay_groups(parameters: NamedParameters, weight_decay: float) -> list[dict[str, object]]:
    """The parameter groups, with and without weight decay, that a torch optimizer takes; empty ones are left out."""
    groups = [
        {"params": [t.part for t in parameters if decays(t.name, t.shape)], "weight_decay": weight_decay},
        {"params": [t.part for t in parameters if not decays(t.name, t.shape)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class NamedOptimizer:
    """One optimizer step over all of `parts`; between them they own every parameter once.

    remembers: what each parameter's state consists of, by its name and shape.
    """

    def __init__(
        self, parts: Sequence[torch.optim.Optimizer], parameters: NamedParameters, remembers: Remembers
    ) -> None:
        self.parts = parts
        self._trained: dict[Tensor, Trained] = {trained.part: trained for trained in parameters}
        self._remembers = remembers

    def set_lr(self, lr: float) -> None:
        """The learning rate of all parameters from the next step on."""
        for group in self._groups():
            group["lr"] = lr

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for trained in self._trained.values():
            trained.attach()
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for trained in self._trained.values():
            trained.parameter.grad = trained.part.grad = None

    def stateless(self) -> list[str]:
        """Names of the parameters that have not been updated yet, and so have no state."""
        stateless = (p for p in self._trained if not any(p in part.state for part in self.parts))
        return sorted(self._trained[p].name for p in stateless)

    def state_tensors(self) -> dict[str, Tensor]:
        """The state as `parameter name/state name` -> tensor; of a sharded parameter the state is sharded as it is."""
        found = {}
        for part in self.parts:
            for p, state in part.state.items():
                trained = self._trained[p]
                for key, value in state.items():
                    cut = trained.is_cut_like(value)
                    found[f"{trained.name}/{key}"] = distributed.as_sharded(value, trained.parameter) if cut else value
        return found

    def load_state_tensors(self, tensors: Mapping[str, Tensor], *, stateless: Sequence[str], origin: str) -> None:
        """Take over the state that `state_tensors` gave, gathered; every process cuts its part of it.

        Raises `CorruptError` when a parameter that is not `stateless` finds none, or one of another kind or shape.
        """
        by_name: dict[str, dict[str, Tensor]] = {}
        for full_name, tensor in tensors.items():
            name, key = full_name.rsplit("/", 1)
            by_name.setdefault(name, {})[key] = tensor
        self._check_complete(by_name, set(stateless), origin)
        for trained in self._trained.values():
            if trained.name in by_name:
                expected = self._remembers(trained.name, trained.shape)
                _check_fits(f"{origin}: {trained.name}", by_name[trained.name], expected)
        for part in self.parts:
            for p in (p for group in part.param_groups for p in group["params"]):
                state = by_name.get(self._trained[p].name)
                if state:
                    part.state[p] = {key: _taken(tensor, self._trained[p]) for key, tensor in state.items()}

    def _check_complete(self, by_name: dict[str, dict[str, Tensor]], stateless: set[str], origin: str) -> None:
        names = [trained.name for trained in self._trained.values()]
        missing = [name for name in names if name not in by_name and name not in stateless]
        if missing:
            more = f" … and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise CorruptError(f"{origin}: no optimizer state for {', '.join(missing[:5])}{more}")

    def _groups(self) -> list[dict[str, object]]:
        return [group for part in self.parts for group in part.param_groups]


def _taken(state: Tensor, trained: Trained) -> Tensor:
    """What this process keeps of a state tensor."""
    per_number = state.ndim > 0 and state.shape == trained.parameter.shape
    return (distributed.shard_like(state, trained.parameter) if per_number else state).to(trained.part.device)


def _check_fits(where: str, state: Mapping[str, Tensor], expected: Mapping[str, Held]) -> None:
    if state.keys() != expected.keys():
        raise CorruptError(f"{where}: optimizer state has {sorted(state)}, expected {sorted(expected)}")
    for key, tensor in state.items():
        held = expected[key]
        if tensor.shape != held.shape:
            raise CorruptError(f"{where}/{key}: got {tuple(tensor.shape)}, expected {held.shape}")
        if tensor.dtype != held.dtype:
            raise CorruptError(f"{where}/{key}: got {tensor.dtype}, expected {held.dtype}")
