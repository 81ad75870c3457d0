"""Optimizers that treat every number alike: in bounded pieces, whatever format their moments are kept in."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from swamla.errors import require
from swamla.train.optim.moments import Moment, Moments, held_moment, moment_in, require_torchao
from swamla.train.optim.named import Held, NamedParameters, Shape

# Numbers updated at a time: the fp32 copies of moments kept in fewer bits must stay small beside the moments.
PIECE = {"cpu": 1 << 18, "cuda": 1 << 24}


@dataclass(frozen=True)
class Piece:
    """Some numbers of a parameter, their gradients and moments, all flat. updates: of the parameter, this one too."""

    weights: Tensor
    gradients: Tensor
    moments: dict[str, Moment]
    updates: float


def require_whole(parameters: NamedParameters, moments: Moments) -> None:
    """Raise `ConfigError` for 8-bit moments of sharded parameters: 256 numbers share a scale, wherever a shard ends."""
    whole = all(trained.part is trained.parameter for trained in parameters)
    allowed = 'needs every parameter whole: "bf16" or "fp32" where parallel is fsdp or hsdp, or expert_parallel above 1'
    require(whole or moments != "8bit", "moments", moments, allowed)


def coarser_moments(config: Any, moments: Moments) -> Iterator[tuple[str, Any]]:
    """Flags that let an optimizer keep its moments in fewer bits than fp32, and the config that each leads to."""
    for fewer in ("bf16", "8bit"):
        if fewer != moments:
            yield f"--{config.kind}_moments {fewer}", replace(config, moments=fewer)


class Elementwise(torch.optim.Optimizer):
    """Base: makes and counts the state, cuts parameters into pieces, and gathers pieces to lists for `update`."""

    SIGNED: ClassVar[dict[str, bool]]  # the moments, and whether they can be negative
    COUNTS: ClassVar[bool]  # whether the algorithm needs the number of updates

    def __init__(self, groups: list[dict[str, Any]], moments: Moments, defaults: dict[str, Any]) -> None:
        if moments == "8bit":
            require_torchao()
        self.moments = moments
        self._noise: dict[torch.device, torch.Generator] = {}
        super().__init__(groups, defaults)

    @classmethod
    def held(cls, shape: Shape, moments: Moments) -> dict[str, Held]:
        """What is remembered of a parameter of this shape. Stochastic rounding too needs the number of updates."""
        held = {key: value for name in cls.SIGNED for key, value in held_moment(name, shape, moments).items()}
        return {"step": Held(())} | held if cls.COUNTS or moments == "bf16" else held

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. `closure` is not used."""
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        updates = self._count([p for _, params in groups for p in params])
        for group, params in groups:
            for pieces in gathered(piece for p in params for piece in self._pieces(p, updates.get(p, 0.0))):
                values = {name: [piece.moments[name].read() for piece in pieces] for name in self.SIGNED}
                self.update(pieces, values, group)
                for name, tensors in values.items():
                    for piece, value in zip(pieces, tensors, strict=True):
                        piece.moments[name].write(value)

    @abstractmethod
    def update(self, pieces: list[Piece], values: dict[str, list[Tensor]], group: dict[str, Any]) -> None:
        """Change the pieces' weights and `values`, their moments in fp32, in place."""

    def _count(self, params: list[Tensor]) -> dict[Tensor, float]:
        """Make missing state, count this update, and start the noise; gives how often each parameter was updated.

        The noise follows from the counts alone: a resumed run draws what the uninterrupted one would have drawn, and
        so does every process that holds a copy of the parameters, whatever else draws random numbers there.
        """
        for p in params:
            if not self.state[p]:
                held = self.held(tuple(p.shape), self.moments)
                self.state[p] = {key: value.zeros(p.device) for key, value in held.items()}
        counters = [self.state[p]["step"] for p in params if "step" in self.state[p]]
        if not counters:
            return {}
        torch._foreach_add_(counters, 1)
        counts = torch.stack(counters).tolist()
        for device in {p.device for p in params}:
            noise = self._noise.setdefault(device, torch.Generator(device))
            noise.manual_seed(int(sum(counts)))
        return dict(zip(params, counts, strict=True))

    def _pieces(self, p: Tensor, updates: float) -> Iterator[Piece]:
        assert p.grad is not None
        weights, gradients, state = p.detach().view(-1), p.grad.reshape(-1), self.state[p]
        noise = self._noise.setdefault(p.device, torch.Generator(p.device))
        moments = {name: moment_in(state, name, signed=signed, noise=noise) for name, signed in self.SIGNED.items()}
        size = PIECE[p.device.type]
        for start in range(0, len(weights), size):
            stop = min(start + size, len(weights))
            cut = {name: moment.piece(start, stop) for name, moment in moments.items()}
            yield Piece(weights[start:stop], gradients[start:stop], cut, updates)


def gathered(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in lists as long as fit into the size of one: a list costs one kernel where a GPU has fused ones."""
    together: list[Piece] = []
    for piece in pieces:
        if together and sum(len(p.weights) for p in [*together, piece]) > PIECE[piece.weights.device.type]:
            yield together
            together = []
        together.append(piece)
    if together:
        yield together
