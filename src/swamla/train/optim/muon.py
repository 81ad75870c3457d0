"""Muon (Keller Jordan, 2024; arXiv 2502.16982): orthogonalised momentum; matrices of equal shapes are stacked."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from swamla import distributed
from swamla.errors import require
from swamla.model.accounting import ParameterSpec
from swamla.model.mup import muon_multiple
from swamla.registry import register
from swamla.train.optim.adamw import AdamWConfig, check_adam, fused_adamw
from swamla.train.optim.named import (
    NamedOptimizer,
    OptimizerConfig,
    Shape,
    StateTensor,
    adam_width_multiple,
    is_embedding,
    named_parameters,
)
from swamla.train.optim.sharing import orthogonalise_distributed
from swamla.train.precision import Chosen
from swamla.train.schedule import warmed_up

Polynomials = tuple[tuple[float, float, float], ...]
"""(a, b, c) of the odd polynomial x -> ax + bx³ + cx⁵ of every iteration."""

# The quintic with the largest slope at 0; singular values end between 0.7 and 1.2.
JORDAN = (3.4445, -4.7750, 2.0315)
# The best quintics one after the other for singular values from 1e-3, by algorithm 1 of Polar Express (arXiv
# 2505.16932) with its cushion; the last is what they converge to.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
SAFETY = 1.01  # room for the rounding of bf16 in Polar Express: every polynomial is stretched by it
SECOND = "neuron_second_moment"  # of NorMuon
FIRST_MOMENTUM = 0.85  # of a warm-up
STACK = 1 << 26  # numbers orthogonalised at a time: bounds the memory of a step, and fills any GPU

Coefficients = Literal["jordan", "polar_express"]


@register
@dataclass(frozen=True, kw_only=True)
class MuonConfig(OptimizerConfig):
    """Muon for the matrices inside blocks, one per expert; AdamW for everything else; one learning rate.

    A matrix's update is scaled by 0.2·√(longer side) to the size of an AdamW update (arXiv 2502.16982,
    eq. 4), so learning rates and weight decay tuned for AdamW suit both.
    momentum: of Muon.
    momentum_warmup: over which the momentum rises from 0.85, or from a lower momentum, to its value: below 1 a
        fraction of the run, from 1 on a number of steps (Keller Jordan, modded-nanogpt, 2024).
    decay: weight decay of the matrices: "plain", of every weight; or "cautious", only of weights that the update
        moves towards 0 too (arXiv 2510.12402).
    coefficients: of Newton–Schulz: "jordan", the same in every iteration; or "polar_express", the best of each
        (arXiv 2505.16932).
    normuon: decay of the second moment of each neuron's orthogonalised updates, by whose root they are divided, so that
        all neurons move equally far (NorMuon, arXiv 2510.05491, e.g. 0.95); none for plain Muon.
    iterations: of Newton–Schulz.  betas, eps: of AdamW.
    """

    kind: ClassVar[str] = "muon"
    momentum: float = 0.95
    momentum_warmup: float = 0.0
    decay: Literal["plain", "cautious"] = "plain"
    coefficients: Coefficients = "jordan"
    normuon: float | None = None
    iterations: int = 5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        require(0 <= self.momentum < 1, "momentum", self.momentum, "must be at least 0 and below 1, e.g. 0.95")
        shortest = self.momentum_warmup >= 0
        require(
            shortest, "momentum_warmup", self.momentum_warmup, "must be >= 0: a fraction of the run below 1, else steps"
        )
        decays = self.normuon is None or 0 <= self.normuon < 1
        require(decays, "normuon", self.normuon, "must be at least 0 and below 1, e.g. 0.95, or left out")
        require(1 <= self.iterations < 100, "iterations", self.iterations, "must be 1 … 99, e.g. 5")
        check_adam(self.betas, self.eps)

    def build(self, model: nn.Module, *, lr: float, weight_decay: float, precision: Chosen = "fp32") -> NamedOptimizer:
        """The optimizer of all trainable parameters of `model`."""
        parameters = named_parameters(model)
        hidden = [trained for trained in parameters if is_hidden(trained.spec)]
        others = [trained for trained in parameters if not is_hidden(trained.spec)]
        optimizers: list[torch.optim.Optimizer] = []
        if others:
            optimizers.append(fused_adamw(others, lr, weight_decay, self.betas, self.eps))
        if hidden:
            whole = self.normuon is None or all(trained.local is trained.parameter for trained in hidden)
            require(whole, "normuon", self.normuon, "needs every matrix whole: not for fsdp, hsdp and expert_parallel")
            wholes = {trained.local: trained.parameter for trained in hidden}
            settings: dict[str, Any] = {"momentum": self.momentum, "iterations": self.iterations, "decay": self.decay}
            settings |= {"coefficients": self.coefficients, "normuon": self.normuon}
            dtype = torch.float32 if precision == "fp32" else torch.bfloat16
            optimizers.append(
                Muon(list(wholes), lr=lr, weight_decay=weight_decay, dtype=dtype, wholes=wholes, **settings)
            )
        return NamedOptimizer(optimizers, parameters, self.state_specs, {"momentum": self.momentum_at})

    def width_multiple(self, parameter: ParameterSpec, base: Shape) -> float:
        """µP's rule: the spectral condition for hidden matrices, Adam's for the rest."""
        return muon_multiple(parameter.shape, base) if is_hidden(parameter) else adam_width_multiple(parameter, base)

    def momentum_at(self, progress: float, step: int) -> float:
        """The momentum of step `step` (from 0), after which the run's progress will be `progress`."""
        first = min(FIRST_MOMENTUM, self.momentum)
        return first + (self.momentum - first) * warmed_up(self.momentum_warmup, progress, step)

    def state_specs(self, parameter: ParameterSpec) -> Mapping[str, StateTensor]:
        """The momentum of hidden matrices, AdamW's state for the rest."""
        if is_hidden(parameter):
            momentum = {"momentum_buffer": StateTensor(parameter.shape)}
            return momentum if self.normuon is None else momentum | {SECOND: StateTensor(neurons(parameter.shape))}
        return AdamWConfig().state_specs(parameter)


def is_hidden(parameter: ParameterSpec) -> bool:
    """True for a matrix, or a stack of experts' matrices, that maps activations to activations.

    False for routers, whose rows are one vector per expert, for filters of convolutions, and for matrices with a side
    of 8 or less.
    """
    name, shape, vectors = parameter
    return (
        len(shape) in (2, 3)
        and min(shape[-2:]) > 8
        and name != "head.weight"
        and not is_embedding(name)
        and not vectors
    )


@dataclass(frozen=True)
class Matrices:
    """A matrix, or several of a stacked parameter, with gradients, momentum and, for NorMuon, second moment."""

    weights: Tensor
    gradients: Tensor
    momentum: Tensor
    second: Tensor | None = None


Orthogonalised = Callable[[list[Tensor]], Iterable[tuple[int, Tensor]]]
"""Orthogonalises updates; yields (index, orthogonalised update) in any order."""


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` with Nesterov momentum and `match_rms_adamw`, on stacks of matrices instead of a loop."""

    def __init__(
        self,
        params: list[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        iterations: int = 5,
        coefficients: Coefficients = "jordan",
        decay: str = "plain",
        normuon: float | None = None,
        dtype: torch.dtype = torch.float32,
        wholes: Mapping[nn.Parameter, nn.Parameter] | None = None,
    ) -> None:
        """dtype: of Newton–Schulz, which tolerates low precision.

        wholes: local shard → full parameter, for sharded parameters.
        """
        self._wholes = wholes or {}
        self._dtype = dtype
        self._polynomials = polynomials(coefficients, iterations)
        self._normuon = normuon
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient. `closure` is not used.

        On several ranks each updates the momentum of its own shards and orthogonalises its share of the matrices.
        """
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if distributed.world_size() > 1:
                wholes = [self._wholes.get(p, p) for p in params]
                self._update([self._matrix(p) for p in params], wholes, group, partial(self._by_all, wholes))
                continue
            for equal in stacks(part for p in params for part in self._matrices(p)):
                self._update(equal, [m.weights for m in equal], group, self._by_this_process)

    def _update(
        self, matrices: list[Matrices], wholes: Sequence[Tensor], group: dict[str, Any], orthogonalised: Orthogonalised
    ) -> None:
        """Update all `matrices` at once. wholes: the full matrices of these shards."""
        weights, gradients, buffers = (
            [getattr(m, name) for m in matrices] for name in ("weights", "gradients", "momentum")
        )
        momentum, lr = group["momentum"], group["lr"]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, buffers, momentum)
        if group["decay"] == "plain":
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        for index, update in orthogonalised(list(updates)):
            if group["decay"] == "cautious":
                agrees = update * weights[index] >= 0
                weights[index].addcmul_(weights[index], agrees, value=-lr * group["weight_decay"])
            second = matrices[index].second
            if second is None or self._normuon is None:
                weights[index].add_(update, alpha=-lr * 0.2 * math.sqrt(max(wholes[index].shape[-2:])))
            else:
                scale = neuron_scale(update, second, self._normuon)
                weights[index].addcmul_(update, scale.unsqueeze(inputs_of(update)), value=-lr * 0.2)

    def _by_this_process(self, updates: list[Tensor]) -> Iterable[tuple[int, Tensor]]:
        return enumerate(orthogonalise_all(updates, self._polynomials, self._dtype))

    def _by_all(self, wholes: list[Tensor], updates: list[Tensor]) -> Iterable[tuple[int, Tensor]]:
        orthogonalised = partial(in_stacks, polynomials=self._polynomials, dtype=self._dtype)
        return orthogonalise_distributed(updates, wholes, orthogonalised, self._dtype)

    def _matrices(self, p: Tensor) -> Iterator[Matrices]:
        """The whole parameter, or a few experts at a time if it is very large."""
        whole = self._matrix(p)
        if p.ndim == 2:
            yield whole
            return
        experts = max(1, STACK // p[0].numel())
        pieces = (t.split(experts) for t in (whole.weights, whole.gradients, whole.momentum))
        second = repeat(None) if whole.second is None else whole.second.split(experts)
        for weights, gradients, momentum, of_neurons in zip(*pieces, second, strict=False):
            yield Matrices(weights, gradients, momentum, of_neurons)

    def _matrix(self, p: Tensor) -> Matrices:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
            if self._normuon is not None:
                state[SECOND] = p.new_zeros(neurons(p.shape))
        return Matrices(p.detach(), p.grad, state["momentum_buffer"], state.get(SECOND))


def inputs_of(matrices: Tensor) -> int:
    """The dimension of a neuron's inputs: experts' matrices are stored as (inputs, outputs), unlike linear layers'."""
    return -1 if matrices.ndim == 2 else -2


def neurons(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of one number per neuron of a matrix or of a stack of experts."""
    return (shape[0],) if len(shape) == 2 else (shape[0], shape[2])


def neuron_scale(update: Tensor, second: Tensor, beta: float) -> Tensor:
    """The factor of each neuron's update in NorMuon (arXiv 2510.05491, algorithm 1); the scaled update has an RMS of 1.

    update: orthogonalised, a matrix or a stack of experts'.  second: the neurons' second moment, which is updated.
    """
    squares = torch.linalg.vector_norm(update, dim=inputs_of(update), dtype=torch.float32).square_()
    second.lerp_(squares / update.shape[inputs_of(update)], 1 - beta)
    scale = 1 / (second.sqrt() + 1e-10)
    norm = (squares * scale.square()).sum(-1, keepdim=True).sqrt_().clamp_(min=1e-10)
    return scale * (math.sqrt(math.prod(update.shape[-2:])) / norm)


def in_stacks(matrices: Sequence[Tensor], polynomials: Polynomials, dtype: torch.dtype) -> list[Tensor]:
    """`orthogonalise` matrices of any shapes; those with equal sides are stacked."""
    found: dict[int, list[Tensor]] = defaultdict(list)
    places: dict[int, int] = {}
    pieces = []
    for index, matrix in enumerate(matrices):
        experts = max(1, STACK // max(1, matrix[:1].numel())) if matrix.ndim == 3 else len(matrix)
        for piece in matrix.split(experts) if len(matrix) else ():
            places[id(piece)] = index
            pieces.append(Matrices(piece, piece, piece))
    for equal in stacks(pieces):
        for m, update in zip(equal, orthogonalise_all([m.weights for m in equal], polynomials, dtype), strict=True):
            found[places[id(m.weights)]].append(update)
    return [torch.cat(found[i]) if len(found[i]) > 1 else (found[i] or [m])[0] for i, m in enumerate(matrices)]


def stacks(matrices: Iterable[Matrices]) -> Iterator[list[Matrices]]:
    """Groups of matrices of the same shape up to transposition, as many as `STACK` allows."""
    open_stacks: dict[tuple[int, ...], list[Matrices]] = defaultdict(list)
    for matrix in matrices:
        stack = open_stacks[tuple(sorted(matrix.weights.shape[-2:]))]
        if stack and sum(m.weights.numel() for m in [*stack, matrix]) > STACK:
            yield list(stack)
            stack.clear()
        stack.append(matrix)
    yield from open_stacks.values()


def orthogonalise_all(equal: Sequence[Tensor], polynomials: Polynomials, dtype: torch.dtype) -> list[Tensor]:
    """`orthogonalise` matrices (A, B) and (B, A), and stacks of them, in one batch, in `dtype`."""
    stacked = [m if m.ndim == 3 else m[None] for m in equal]
    stacked = [m if is_wide(m) else m.mT for m in stacked]
    joined = torch.cat(stacked)
    updates = orthogonalise(joined.to(dtype), polynomials).split([len(m) for m in stacked])
    back = [update if is_wide(m) else update.mT for m, update in zip(equal, updates, strict=True)]
    return [update if m.ndim == 3 else update[0] for m, update in zip(equal, back, strict=True)]


def is_wide(matrix: Tensor) -> bool:
    """True if the matrices have no more rows than columns."""
    return matrix.shape[-2] <= matrix.shape[-1]


def polynomials(coefficients: Coefficients, iterations: int) -> Polynomials:
    """The polynomials of the iterations, for singular values of at most 1."""
    if coefficients == "jordan":
        return (JORDAN,) * iterations
    *first, last = POLAR_EXPRESS
    stretched = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in first]
    found = [*stretched, *[last] * iterations][:iterations]
    a, b, c = found[0]  # the paper's code divides the matrix by 1.01 times its norm
    return ((a / SAFETY, b / SAFETY**3, c / SAFETY**5), *found[1:])


def orthogonalise(stack_NAB: Tensor, polynomials: Polynomials) -> Tensor:
    """Move the singular values of N matrices (A <= B) towards 1, by Newton–Schulz in the stack's dtype."""
    x_NAB = stack_NAB / torch.linalg.matrix_norm(stack_NAB, keepdim=True).clamp(min=1e-7)
    for a, b, c in polynomials:
        gram_NAA = x_NAB @ x_NAB.mT
        poly_NAA = torch.baddbmm(gram_NAA, gram_NAA, gram_NAA, beta=b, alpha=c)
        x_NAB = torch.baddbmm(x_NAB, poly_NAA, x_NAB, beta=a)
    return x_NAB
