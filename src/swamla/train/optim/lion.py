"""Lion (arXiv 2302.06675): updates by the sign of an interpolated momentum, so all weights move equally far."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from swamla.model.accounting import ParameterSpec
from swamla.registry import register
from swamla.train.optim.adamw import check_betas
from swamla.train.optim.elementwise import Chunk, Elementwise, coarser_moments, require_whole
from swamla.train.optim.moments import Moments
from swamla.train.optim.named import (
    NamedOptimizer,
    OptimizerConfig,
    Shape,
    StateTensor,
    adam_width_multiple,
    decay_groups,
    named_parameters,
)
from swamla.train.precision import Chosen


@register
@dataclass(frozen=True, kw_only=True)
class LionConfig(OptimizerConfig):
    """Lion. Needs 3 to 10 times AdamW's weight decay, at a learning rate lower by the same factor (section 5).

    The original project called it FP8Lion with a bf16 moment, though nothing in it was FP8.
    betas: weight of the moment in the update, and the moment's decay.
    moments: "fp32", 4 bytes per parameter; "bf16" with stochastic rounding, 2; "8bit" with torchao's map, about 1.
    """

    kind: ClassVar[str] = "lion"
    betas: tuple[float, float] = (0.9, 0.99)
    moments: Moments = "fp32"

    def __post_init__(self) -> None:
        check_betas(self.betas, "0.9, 0.99")

    def build(self, model: nn.Module, *, lr: float, weight_decay: float, precision: Chosen = "fp32") -> NamedOptimizer:
        """The optimizer of all trainable parameters of `model`. Raises `MissingBackendError` without torchao."""
        parameters = named_parameters(model)
        require_whole(parameters, self.moments)
        lion = Lion(decay_groups(parameters, weight_decay), lr=lr, betas=self.betas, moments=self.moments)
        return NamedOptimizer([lion], parameters, self.state_specs)

    def state_specs(self, parameter: ParameterSpec) -> Mapping[str, StateTensor]:
        """The moment, and for stochastic rounding the number of updates."""
        return Lion.state_specs(parameter.shape, self.moments)

    def width_multiple(self, parameter: ParameterSpec, base: Shape) -> float:
        """µP's rule for Adam."""
        return adam_width_multiple(parameter, base)

    def coarser(self) -> Iterator[tuple[str, Self]]:
        """The moment in fewer bits."""
        return coarser_moments(self, self.moments)


class Lion(Elementwise):
    """Lion with a moment in any format: the arithmetic is fp32, only the stored moment is rounded."""

    SIGNED: ClassVar[dict[str, bool]] = {"exp_avg": True}
    COUNTS: ClassVar[bool] = False

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], moments: Moments
    ) -> None:
        super().__init__(groups, moments, {"lr": lr, "betas": betas})

    def update(self, chunks: list[Chunk], values: dict[str, list[Tensor]], group: dict[str, Any]) -> None:
        """One step of algorithm 2 of the paper."""
        (beta1, beta2), lr = group["betas"], group["lr"]
        weights, gradients = [chunk.weights for chunk in chunks], [chunk.gradients for chunk in chunks]
        moments = values["exp_avg"]
        signs = torch._foreach_lerp(moments, gradients, 1 - beta1)
        torch._foreach_sign_(signs)
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_add_(weights, signs, alpha=-lr)
        torch._foreach_lerp_(moments, gradients, 1 - beta2)
