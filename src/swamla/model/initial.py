"""Where weights start: a function of the seed, a parameter's name and its shape alone.

So every parameter can be drawn by itself, in any order and by any process, and a model starts from the same numbers
however it is laid out over processes.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Draw = Callable[[Tensor, torch.Generator | None], object]
"""Fills an fp32 tensor on the CPU, in place; without a generator from torch's global one."""


@runtime_checkable
class HasOwnStart(Protocol):
    """A module some of whose parameters start otherwise than the model's rule has it."""

    def own_start(self) -> Mapping[str, Draw]:
        """How they are drawn, by their names in the module."""


TORCHS_INITIALISERS = frozenset(f for name, f in vars(nn.init).items() if name.endswith("_") and callable(f))


class Unfilled(TorchFunctionMode):
    """Passes torch's own initialisers over: on the meta device they load torch's compiler, which takes a second."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in TORCHS_INITIALISERS:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def normal(std: float) -> Draw:
    """Normal numbers around 0."""
    return lambda into, generator: into.normal_(0.0, std, generator=generator)


def uniform(bound: float) -> Draw:
    """Numbers in ±`bound`, all alike."""
    return lambda into, generator: into.uniform_(-bound, bound, generator=generator)


def constant(value: float) -> Draw:
    """One number."""
    return lambda into, generator: into.fill_(value)


def own_starts(module: nn.Module) -> dict[str, Draw]:
    """What the module, and all within it, draw by rules of their own, by full name."""
    return {
        f"{prefix}.{name}" if prefix else name: draw
        for prefix, part in module.named_modules()
        if isinstance(part, HasOwnStart)
        for name, draw in part.own_start().items()
    }


@torch.no_grad()
def draw_alone(module: HasOwnStart) -> None:
    """Draw the parameters of a module outside any model, from torch's global generator."""
    assert isinstance(module, nn.Module)
    for name, draw in module.own_start().items():
        parameter = module.get_parameter(name)
        if not parameter.is_meta:
            draw(parameter, None)


def drawn(draw: Draw, shape: torch.Size, seed: int, name: str) -> Tensor:
    """The fp32 tensor on the CPU that the parameter `name` starts from."""
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(key, "little"))
    into = torch.empty(shape, dtype=torch.float32, device="cpu")
    draw(into, generator)
    return into
