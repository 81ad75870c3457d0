"""Several torch optimizers seen as one, whose state is named by parameter so that it can be kept as safetensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swamla.errors import CorruptError

EMBEDDINGS = frozenset({"embedding.weight", "positions.weight"})

NamedParameters = list[tuple[str, nn.Parameter]]


def named_parameters(model: nn.Module) -> NamedParameters:
    """The trainable parameters of a model, each once."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay pulls on matrices that multiply activations; not on gains, biases and embeddings."""
    return parameter.ndim >= 2 and name not in EMBEDDINGS


def decay_groups(parameters: NamedParameters, weight_decay: float) -> list[dict[str, object]]:
    """The parameter groups, with and without weight decay, that a torch optimizer takes; empty ones are left out."""
    groups = [
        {"params": [p for name, p in parameters if decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in parameters if not decays(name, p)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


@dataclass(frozen=True)
class Part:
    """A torch optimizer, and the names of what it remembers of each parameter."""

    optimizer: torch.optim.Optimizer
    remembers: frozenset[str]


class NamedOptimizer:
    """One optimizer step over all of `parts`; between them they own every parameter once."""

    def __init__(self, parts: Sequence[Part], parameters: NamedParameters) -> None:
        self.parts = parts
        self._name: dict[Tensor, str] = {p: name for name, p in parameters}

    def set_lr(self, lr: float) -> None:
        """The learning rate of all parameters from the next step on."""
        for group in self._groups():
            group["lr"] = lr

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for part in self.parts:
            part.optimizer.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for part in self.parts:
            part.optimizer.zero_grad(set_to_none=True)

    def stateless(self) -> list[str]:
        """Names of the parameters that have not been updated yet, and so have no state."""
        return sorted(
            name for p, name in self._name.items() if not any(p in part.optimizer.state for part in self.parts)
        )

    def state_tensors(self) -> dict[str, Tensor]:
        """The state as `parameter name/state name` -> tensor."""
        return {
            f"{self._name[p]}/{key}": value
            for part in self.parts
            for p, state in part.optimizer.state.items()
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
        for part in self.parts:
            for p in (p for group in part.optimizer.param_groups for p in group["params"]):
                state = by_name.get(self._name[p])
                if state:
                    _check_fits(f"{origin}: {self._name[p]}", state, part.remembers, p)
                    part.optimizer.state[p] = {key: tensor.to(p.device) for key, tensor in state.items()}

    def _check_complete(self, by_name: dict[str, dict[str, Tensor]], stateless: set[str], origin: str) -> None:
        missing = [name for name in self._name.values() if name not in by_name and name not in stateless]
        if missing:
            more = f" … and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise CorruptError(f"{origin}: no optimizer state for {', '.join(missing[:5])}{more}")

    def _groups(self) -> list[dict[str, object]]:
        return [group for part in self.parts for group in part.optimizer.param_groups]


def _check_fits(where: str, state: Mapping[str, Tensor], remembers: frozenset[str], parameter: nn.Parameter) -> None:
    if state.keys() != remembers:
        raise CorruptError(f"{where}: optimizer state has {sorted(state)}, expected {sorted(remembers)}")
    for key, tensor in state.items():
        if tensor.ndim and tensor.shape != parameter.shape:
            raise CorruptError(f"{where}/{key}: got {tuple(tensor.shape)}, expected {tuple(parameter.shape)}")
