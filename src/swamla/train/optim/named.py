"""The optimizer of a run: torch optimizers used as one, with state by parameter name, to be stored as safetensors."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from swamla import distributed
from swamla.errors import ConfigError, CorruptError, require
from swamla.model.accounting import ParameterSpec
from swamla.model.language_model import vectors_of
from swamla.model.mup import adam_multiple
from swamla.registry import Registered
from swamla.train.precision import Chosen


def is_embedding(name: str) -> bool:
    """True for a table of vectors that tokens, n-grams or positions look up; a tied head is one."""
    return name in ("embedding.weight", "positions.weight") or name.startswith("ngrams.")


Role = Literal["embedding", "head", "matrix", "scalar"]
"""What a parameter is to the optimizer: an embedding (a tied head included), the head, a matrix, or anything else."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StateTensor:
    """Shape and dtype of one tensor of a parameter's optimizer state."""

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
    """A parameter of the model, and the shard of it that this rank updates.

    parameter: of full shape.  local: this rank's shard, a plain parameter that shares its memory; `parameter` itself if
    it is not sharded.  vectors: whether it is a set of vectors, see `MixerConfig.vectors`.
    """

    name: str
    parameter: nn.Parameter
    local: nn.Parameter
    vectors: bool

    @property
    def shape(self) -> Shape:
        """The full shape."""
        return tuple(self.parameter.shape)

    @property
    def spec(self) -> ParameterSpec:
        """Name, shape and whether it is a set of vectors, which the config determines too."""
        return ParameterSpec(self.name, self.shape, self.vectors)

    def attach(self) -> None:
        """Make `local` refer to the current weights and gradient."""
        if self.local is not self.parameter:
            gradient = self.parameter.grad
            self.local.data = distributed.local(self.parameter.detach())
            self.local.grad = None if gradient is None else distributed.local(gradient)

    def is_sharded_like(self, state: Tensor) -> bool:
        """True for a state tensor with one number per element of the shard, if the parameter is sharded."""
        return self.local is not self.parameter and state.ndim > 0 and state.shape == self.local.shape


NamedParameters = list[Trained]
StateSpecs = Callable[[ParameterSpec], Mapping[str, StateTensor]]
Follows = Callable[[float, int], float]
"""A setting by the run's progress (0 … 1) at the end of a step, and the step (from 0)."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Registered, home="swamla.train.optim"):
    """The contract of an optimizer's config."""

    @abstractmethod
    def build(
        self, model: nn.Module, *, lr: float, weight_decay: float, precision: Chosen = "fp32"
    ) -> "NamedOptimizer":
        """The optimizer of all trainable parameters of `model`.

        precision: of the run; the optimizer may compute its own products in it.
        """

    @abstractmethod
    def state_specs(self, parameter: ParameterSpec) -> Mapping[str, StateTensor]:
        """The optimizer state of a parameter, after its first update."""

    def width_multiple(self, parameter: ParameterSpec, base: Shape) -> float:
        """µP: the learning rate of a parameter, relative to that at the base width, where its shape is `base`.

        Raises `ConfigError` for an optimizer without a rule.
        """
        raise ConfigError("optimizer", self.kind, "has no rule for µP: leave mup_base_width out")

    def coarser(self) -> Iterator[tuple[str, Self]]:
        """Flags that reduce the optimizer state, each with the resulting config; none by default."""
        return iter(())

    def state_bytes(self, parameters: Iterable[ParameterSpec]) -> int:
        """Bytes of the state of these parameters, the 4-byte step counters included."""
        return sum(state.nbytes for parameter in parameters for state in self.state_specs(parameter).values())


def named_parameters(model: nn.Module) -> NamedParameters:
    """The trainable parameters of a model; tied ones appear once."""
    vectors = vectors_of(model)
    return [Trained(name, p, _local(p), name in vectors) for name, p in model.named_parameters() if p.requires_grad]


def _local(p: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(distributed.local(p.detach())) if distributed.sharded(p) else p


def decays(name: str, shape: Sequence[int]) -> bool:
    """True if weight decay applies: to matrices, stacks of matrices and convolution filters.

    It applies neither to embeddings, tied heads included, nor to vectors: gains, biases, A_log and dt_bias.
    """
    return len(shape) >= 2 and not is_embedding(name)


def decay_groups(parameters: NamedParameters, weight_decay: float) -> list[dict[str, object]]:
    """Parameter groups for a torch optimizer, with and without weight decay; empty groups are left out."""
    groups = [
        {"params": [t.local for t in parameters if decays(t.name, t.shape)], "weight_decay": weight_decay},
        {"params": [t.local for t in parameters if not decays(t.name, t.shape)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def role_of(parameter: ParameterSpec) -> Role:
    """The role of a parameter. Scalars are gains, biases, A_log, dt_bias, filters of convolutions, and routers."""
    if is_embedding(parameter.name):
        return "embedding"
    if parameter.name == "head.weight":
        return "head"
    return "matrix" if len(parameter.shape) >= 2 and not parameter.vectors else "scalar"


@dataclass(frozen=True, kw_only=True)
class GroupRates:
    """Learning rates by role, as multiples of the run's, and weight decays by role.

    Weight decay follows the multiple: it pulls by lr · multiple · decay. A role that is left out has the run's rate,
    and the decay that the optimizer chose.
    """

    lr: Mapping[Role, float]
    weight_decay: Mapping[Role, float]


def adam_width_multiple(parameter: ParameterSpec, base: Shape) -> float:
    """`width_multiple` of optimizers that move every weight equally far: Adam's of table 8 of arXiv 2203.03466."""
    inside = parameter.name.startswith("blocks.") and len(parameter.shape) >= 2
    return adam_multiple(parameter.shape, base) if inside else 1.0


class NamedOptimizer:
    """Several torch optimizers, each parameter in one of them, used as one.

    state_specs: the tensors of a parameter's state.  schedules: settings of groups that follow the run.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        parameters: NamedParameters,
        state_specs: StateSpecs,
        schedules: Mapping[str, Follows] | None = None,
    ) -> None:
        self.optimizers = optimizers
        self._schedules = schedules or {}
        self._trained: dict[Tensor, Trained] = {trained.local: trained for trained in parameters}
        self._state_specs = state_specs
        for group in self._groups():
            group["lr_multiple"] = 1.0

    def set_lr(self, lr: float) -> None:
        """Set the learning rate; each parameter has its multiple of it."""
        for group in self._groups():
            group["lr"] = lr * group["lr_multiple"]

    def set_progress(self, progress: float, step: int) -> None:
        """Set what follows the run for step `step` (from 0), after which its progress will be `progress` (0 … 1)."""
        for name, follows in self._schedules.items():
            for group in self._groups():
                if name in group:
                    group[name] = follows(progress, step)

    def set_rates(self, rates: GroupRates, multiples: Mapping[str, float] | None = None) -> None:
        """Give every role its learning rate and weight decay: splits the groups of the optimizers where they differ.

        multiples: factors of the learning rates of single parameters, by name.
        Raises `ConfigError` if an optimizer's groups have no weight decay to set.
        """
        for optimizer in self.optimizers:
            split = [part for group in optimizer.param_groups for part in self._split(group, rates, multiples or {})]
            optimizer.param_groups[:] = split

    def _split(
        self, group: dict[str, Any], rates: GroupRates, multiples: Mapping[str, float]
    ) -> Iterator[dict[str, Any]]:
        """The group in parts of one learning rate and one weight decay each; whole if there is only one."""
        parts: dict[tuple[float, float], list[Tensor]] = {}
        for p in group["params"]:
            role = role_of(self._trained[p].spec)
            decay = rates.weight_decay.get(role, group.get("weight_decay", 0.0))
            can_decay = role not in rates.weight_decay or "weight_decay" in group
            require(can_decay, f"weight_decay_{role}", decay, "this optimizer has no weight decay: leave it out")
            multiple = rates.lr.get(role, 1.0) * multiples.get(self._trained[p].name, 1.0)
            parts.setdefault((multiple, decay), []).append(p)
        for (multiple, decay), params in parts.items():
            part = {**group, "params": params, "lr": group["lr"] * multiple, "lr_multiple": multiple}
            yield part | ({"weight_decay": decay} if "weight_decay" in group else {})

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for trained in self._trained.values():
            trained.attach()
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for trained in self._trained.values():
            trained.parameter.grad = trained.local.grad = None

    def stateless(self) -> list[str]:
        """Names of the parameters without state, because they have never been updated."""
        stateless = (p for p in self._trained if not any(p in optimizer.state for optimizer in self.optimizers))
        return sorted(self._trained[p].name for p in stateless)

    def state_tensors(self) -> dict[str, Tensor]:
        """`parameter name/state name` -> tensor, sharded like its parameter."""
        found = {}
        for optimizer in self.optimizers:
            for p, state in optimizer.state.items():
                trained = self._trained[p]
                for key, value in state.items():
                    is_shard = trained.is_sharded_like(value)
                    found[f"{trained.name}/{key}"] = (
                        distributed.as_sharded(value, trained.parameter) if is_shard else value
                    )
        return found

    def load_state_tensors(self, tensors: Mapping[str, Tensor], *, stateless: Sequence[str], origin: str) -> None:
        """Load what `state_tensors` returned, sharded or full; every rank keeps its shard.

        Raises `CorruptError` if the state of a parameter is missing or does not fit, unless it is `stateless`.
        """
        by_name: dict[str, dict[str, Tensor]] = {}
        for full_name, tensor in tensors.items():
            name, key = full_name.rsplit("/", 1)
            by_name.setdefault(name, {})[key] = tensor
        self._check_complete(by_name, set(stateless), origin)
        for trained in self._trained.values():
            if trained.name in by_name:
                expected = self._state_specs(trained.spec)
                _check_fits(f"{origin}: {trained.name}", by_name[trained.name], expected)
        for optimizer in self.optimizers:
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                state = by_name.get(self._trained[p].name)
                if state:
                    optimizer.state[p] = {key: _local_state(tensor, self._trained[p]) for key, tensor in state.items()}

    def _check_complete(self, by_name: dict[str, dict[str, Tensor]], stateless: set[str], origin: str) -> None:
        names = [trained.name for trained in self._trained.values()]
        missing = [name for name in names if name not in by_name and name not in stateless]
        if missing:
            more = f" … and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise CorruptError(f"{origin}: no optimizer state for {', '.join(missing[:5])}{more}")

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]


def _local_state(state: Tensor, trained: Trained) -> Tensor:
    """This rank's shard of a state tensor."""
    per_number = state.ndim > 0 and state.shape == trained.parameter.shape
    return (distributed.shard_like(state, trained.parameter) if per_number else state).to(trained.local.device)


def _check_fits(where: str, state: Mapping[str, Tensor], expected: Mapping[str, StateTensor]) -> None:
    if state.keys() != expected.keys():
        raise CorruptError(f"{where}: optimizer state has {sorted(state)}, expected {sorted(expected)}")
    for key, tensor in state.items():
        spec = expected[key]
        if tensor.shape != spec.shape:
            raise CorruptError(f"{where}/{key}: got {tuple(tensor.shape)}, expected {spec.shape}")
        if tensor.dtype != spec.dtype:
            raise CorruptError(f"{where}/{key}: got {tensor.dtype}, expected {spec.dtype}")
