"""An optimizer in one file: torch's own SGD with momentum, its state named so that it can be saved."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

import swamla
from swamla.errors import require
from swamla.model import ParameterSpec
from swamla.train.optim import NamedOptimizer, OptimizerConfig, StateTensor, decay_groups, named_parameters


@swamla.register
@dataclass(frozen=True, kw_only=True)
class ToySGDConfig(OptimizerConfig):
    """Stochastic gradient descent.

    momentum: what is kept of the last update.
    """

    kind: ClassVar[str] = "toy_sgd"
    momentum: float = 0.9

    def __post_init__(self) -> None:
        require(0 < self.momentum < 1, "momentum", self.momentum, "must be above 0 and below 1, e.g. 0.9")

    def build(self, model: nn.Module, *, lr: float, weight_decay: float, precision: str = "fp32") -> NamedOptimizer:
        """The optimizer of all trainable parameters of `model`."""
        parameters = named_parameters(model)
        sgd = torch.optim.SGD(decay_groups(parameters, weight_decay), lr=lr, momentum=self.momentum)
        return NamedOptimizer([sgd], parameters, self.state_specs)

    def state_specs(self, parameter: ParameterSpec) -> Mapping[str, StateTensor]:
        """One moment a parameter."""
        return {"momentum_buffer": StateTensor(parameter.shape)}
