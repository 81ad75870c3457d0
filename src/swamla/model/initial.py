"""Initial weights: a function of the seed, a parameter's name and its shape only.

So any process can draw any parameter in any order, and a model has the same initial weights under every data-parallel
strategy.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Initializer = Callable[[Tensor, torch.Generator | None], object]
"""Fills an fp32 tensor on the CPU in place, by the generator or, without one, by torch's global generator."""


@runtime_checkable
class HasInitializers(Protocol):
    """A module that initialises some of its parameters itself."""

    def initializers(self) -> Mapping[str, Initializer]:
        """Initializers by the parameters' names in the module."""


TORCH_INITIALIZERS = frozenset(f for name, f in vars(nn.init).items() if name.endswith("_") and callable(f))


class SkippedInit(TorchFunctionMode):
    """Skips torch's own initializers, which on the meta device import torch's compiler: a second."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in TORCH_INITIALIZERS:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def normal(std: float) -> Initializer:
    """Normal with mean 0."""
    return lambda tensor, generator: tensor.normal_(0.0, std, generator=generator)


def uniform(bound: float) -> Initializer:
    """Uniform in ±`bound`."""
    return lambda tensor, generator: tensor.uniform_(-bound, bound, generator=generator)


def constant(value: float) -> Initializer:
    """Constant."""
    return lambda tensor, generator: tensor.fill_(value)


def initializers_of(module: nn.Module) -> dict[str, Initializer]:
    """The initializers of the module and of all modules within it, by full name."""
    return {
        f"{prefix}.{name}" if prefix else name: initializer
        for prefix, child in module.named_modules()
        if isinstance(child, HasInitializers)
        for name, initializer in child.initializers().items()
    }


@torch.no_grad()
def reset_parameters(module: HasInitializers) -> None:
    """Initialise the parameters of a module that is built outside a model, by torch's global generator."""
    assert isinstance(module, nn.Module)
    for name, initializer in module.initializers().items():
        parameter = module.get_parameter(name)
        if not parameter.is_meta:
            initializer(parameter, None)


def initial_tensor(initializer: Initializer, shape: torch.Size, seed: int, name: str) -> Tensor:
    """The initial values of parameter `name`, in fp32 on the CPU."""
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(key, "little"))
    tensor = torch.empty(shape, dtype=torch.float32, device="cpu")
    initializer(tensor, generator)
    return tensor
