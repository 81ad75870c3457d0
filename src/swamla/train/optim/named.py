"""Several torch optimizers seen as one, whose state is named by parameter so that it can be kept as safetensors."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swamla.errors import CorruptError

EMBEDDINGS = frozenset({"embedding.weight", "positions.weight"})

Shape = tuple[int, ...]
NamedParameters = list[tuple[str, nn.Parameter]]


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


Remembers = Callable[[str, Shape], Mapping[str, Held]]


class OptimizerBase(ABC):
    """What every optimizer's config knows."""

    @abstractmethod
    def build(self, model: nn.Module, *, lr: float, weight_decay: float) -> "NamedOptimizer":
        """The optimizer of all trainable parameters of `model`."""

    @abstractmethod
    def remembers(self, name: str, shape: Shape) -> Mapping[str, Held]:
        """What the optimizer remembers of a parameter of this name and shape once it was updated."""

    def state_bytes(self, parameters: Iterable[tuple[str, Sequence[int]]]) -> int:
        """Bytes of the state of parameters with these names and shapes, each tensor's 4-byte step counter included."""
        return sum(held.nbytes for name, shape in parameters for held in self.remembers(name, tuple(shape)).values())


def named_parameters(model: nn.Module) -> NamedParameters:
    """The trainable parameters of a model, each once."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def decays(name: str, shape: Sequence[int]) -> bool:
    """Weight decay pulls on what multiplies activations: matrices, stacks of them and the filters of convolutions.

    Not on embeddings, nor on vectors: gains, biases, A_log and dt_bias. A head that is tied is an embedding.
    """
    return len(shape) >= 2 and name not in EMBEDDINGS


def decay_groups(parameters: NamedParameters, weight_decay: float) -> list[dict[str, object]]:
    """The parameter groups, with and without weight decay, that a torch optimizer takes; empty ones are left out."""
    groups = [
        {"params": [p for name, p in parameters if decays(name, p.shape)], "weight_decay": weight_decay},
        {"params": [p for name, p in parameters if not decays(name, p.shape)], "weight_decay": 0.0},
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
        self._name: dict[Tensor, str] = {p: name for name, p in parameters}
        self._remembers = remembers

    def set_lr(self, lr: float) -> None:
        """The learning rate of all parameters from the next step on."""
        for group in self._groups():
            group["lr"] = lr

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def stateless(self) -> list[str]:
        """Names of the parameters that have not been updated yet, and so have no state."""
        return sorted(name for p, name in self._name.items() if not any(p in part.state for part in self.parts))

    def state_tensors(self) -> dict[str, Tensor]:
        """The state as `parameter name/state name` -> tensor."""
        return {
            f"{self._name[p]}/{key}": value
            for part in self.parts
            for p, state in part.state.items()
            for key, value in state.items()
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor], *, stateless: Sequence[str], origin: str) -> None:
        """Take over the state that `state_tensors` gave.

        Raises `CorruptError` when a parameter that is not `stateless` finds none, or one of another kind or shape.
        """
        by_name: dict[str, dict[str, Tensor]] = {}
        for full_name, tensor in tensors.items():
            name, key = full_name.rsplit("/", 1)
            by_name.setdefault(name, {})[key] = tensor
        self._check_complete(by_name, set(stateless), origin)
        for p, name in self._name.items():
            if name in by_name:
                _check_fits(f"{origin}: {name}", by_name[name], self._remembers(name, tuple(p.shape)))
        for part in self.parts:
            for p in (p for group in part.param_groups for p in group["params"]):
                state = by_name.get(self._name[p])
                if state:
                    part.state[p] = {key: tensor.to(p.device) for key, tensor in state.items()}

    def _check_complete(self, by_name: dict[str, dict[str, Tensor]], stateless: set[str], origin: str) -> None:
        missing = [name for name in self._name.values() if name not in by_name and name not in stateless]
        if missing:
            more = f" … and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise CorruptError(f"{origin}: no optimizer state for {', '.join(missing[:5])}{more}")

    def _groups(self) -> list[dict[str, object]]:
        return [group for part in self.parts for group in part.param_groups]


def _check_fits(where: str, state: Mapping[str, Tensor], expected: Mapping[str, Held]) -> None:
    if state.keys() != expected.keys():
        raise CorruptError(f"{where}: optimizer state has {sorted(state)}, expected {sorted(expected)}")
    for key, tensor in state.items():
        held = expected[key]
        if tensor.shape != held.shape:
            raise CorruptError(f"{where}/{key}: got {tuple(tensor.shape)}, expected {held.shape}")
        if tensor.dtype != held.dtype:
            raise CorruptError(f"{where}/{key}: got {tensor.dtype}, expected {held.dtype}")
