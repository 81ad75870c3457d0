"""Elementwise optimizers: update parameters in bounded chunks, with moments in any format."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from swamla.errors import require
from swamla.train.optim.moments import Moment, Moments, moment_in, moment_specs, require_torchao
from swamla.train.optim.named import NamedParameters, Shape, StateTensor

# Numbers updated at a time: bounds the temporary fp32 copies of moments in fewer bits.
CHUNK = {"cpu": 1 << 18, "cuda": 1 << 24}


@dataclass(frozen=True)
class Chunk:
    """A flat slice of a parameter, its gradients and moments. updates: of the parameter, this one included."""

    weights: Tensor
    gradients: Tensor
    moments: dict[str, Moment]
    updates: float


def require_whole(parameters: NamedParameters, moments: Moments) -> None:
    """Raise `ConfigError` for 8-bit moments of sharded parameters: blocks of 256 numbers would straddle shards."""
    whole = all(trained.local is trained.parameter for trained in parameters)
    allowed = 'needs every parameter whole: "bf16" or "fp32" where parallel is fsdp or hsdp, or expert_parallel above 1'
    require(whole or moments != "8bit", "moments", moments, allowed)


def coarser_moments(config: Any, moments: Moments) -> Iterator[tuple[str, Any]]:
    """Flags that store moments in fewer bits, each with the resulting config."""
    for fewer in ("bf16", "8bit"):
        if fewer != moments:
            yield f"{config.kind}_moments = {fewer}", replace(config, moments=fewer)


class Elementwise(torch.optim.Optimizer):
    """Base class: creates the state, counts updates, and passes lists of chunks to `update`."""

    SIGNED: ClassVar[dict[str, bool]]  # moment → whether it can be negative
    COUNTS: ClassVar[bool]  # whether the algorithm needs the number of updates

    def __init__(self, groups: list[dict[str, Any]], moments: Moments, defaults: dict[str, Any]) -> None:
        if moments == "8bit":
            require_torchao()
        self.moments = moments
        self._noise: dict[torch.device, torch.Generator] = {}
        super().__init__(groups, defaults)

    @classmethod
    def state_specs(cls, shape: Shape, moments: Moments) -> dict[str, StateTensor]:
        """The state of a parameter of this shape. Stochastic rounding needs the number of updates too."""
        specs = {key: value for name in cls.SIGNED for key, value in moment_specs(name, shape, moments).items()}
        return {"step": StateTensor(())} | specs if cls.COUNTS or moments == "bf16" else specs

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. `closure` is not used."""
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        updates = self._count([p for _, params in groups for p in params])
        for group, params in groups:
            for chunks in grouped(chunk for p in params for chunk in self._chunks(p, updates.get(p, 0.0))):
                values = {name: [chunk.moments[name].read() for chunk in chunks] for name in self.SIGNED}
                self.update(chunks, values, group)
                for name, tensors in values.items():
                    for chunk, value in zip(chunks, tensors, strict=True):
                        chunk.moments[name].write(value)

    @abstractmethod
    def update(self, chunks: list[Chunk], values: dict[str, list[Tensor]], group: dict[str, Any]) -> None:
        """Update in place the chunks' weights and `values`, their moments in fp32."""

    def _count(self, params: list[Tensor]) -> dict[Tensor, float]:
        """Create missing state, count this update, seed the noise; returns how often each parameter was updated.

        The seed depends only on the counts, so resumed runs and all replicas draw the same noise, whatever other random
        numbers they draw.
        """
        for p in params:
            if not self.state[p]:
                specs = self.state_specs(tuple(p.shape), self.moments)
                self.state[p] = {key: value.zeros(p.device) for key, value in specs.items()}
        counters = [self.state[p]["step"] for p in params if "step" in self.state[p]]
        if not counters:
            return {}
        torch._foreach_add_(counters, 1)
        counts = torch.stack(counters).tolist()
        for device in {p.device for p in params}:
            noise = self._noise.setdefault(device, torch.Generator(device))
            noise.manual_seed(int(sum(counts)))
        return dict(zip(params, counts, strict=True))

    def _chunks(self, p: Tensor, updates: float) -> Iterator[Chunk]:
        assert p.grad is not None
        weights, gradients, state = p.detach().view(-1), p.grad.reshape(-1), self.state[p]
        noise = self._noise.setdefault(p.device, torch.Generator(p.device))
        moments = {name: moment_in(state, name, signed=signed, noise=noise) for name, signed in self.SIGNED.items()}
        size = CHUNK[p.device.type]
        for start in range(0, len(weights), size):
            stop = min(start + size, len(weights))
            cut = {name: moment.chunk(start, stop) for name, moment in moments.items()}
            yield Chunk(weights[start:stop], gradients[start:stop], cut, updates)


def grouped(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Groups of small chunks, each at most `CHUNK` numbers in all: a GPU updates a group with one fused kernel."""
    together: list[Chunk] = []
    for chunk in chunks:
        if together and sum(len(p.weights) for p in [*together, chunk]) > CHUNK[chunk.weights.device.type]:
            yield together
            together = []
        together.append(chunk)
    if together:
        yield together
