"""Normalisations over the last dimension: RMSNorm, LayerNorm and DynamicTanh, each with its config."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from swamla.errors import UsageError, require
from swamla.model.initial import Initializer, constant
from swamla.ops import rms_norm
from swamla.registry import Registered, register


@dataclass(frozen=True, kw_only=True)
class FrozenNorm:
    """A norm at one input, as the linear map that it is there: norm(x) = gain ⊙ (x − mean(x)) + bias.

    gain_BTD: frozen at the input.  bias_D: None for 0.  centred: whether the mean is subtracted; else it is not.
    """

    gain_BTD: Tensor
    bias_D: Tensor | None = None
    centred: bool = False

    def linear(self, x_BTD: Tensor) -> Tensor:
        """What a summand x (B, T, D) of the input adds to the output: all but the bias."""
        return self.gain_BTD * (x_BTD - x_BTD.mean(dim=-1, keepdim=True) if self.centred else x_BTD)

    def transposed(self, u_BTD: Tensor) -> Tensor:
        """(B, T, D): the direction with ⟨direction, x⟩ = ⟨u, linear(x)⟩ for every x."""
        scaled_BTD = self.gain_BTD * u_BTD
        return scaled_BTD - scaled_BTD.mean(dim=-1, keepdim=True) if self.centred else scaled_BTD


@dataclass(frozen=True, kw_only=True)
class NormConfig(Registered, home="swamla.model.norm"):
    """The contract of a norm's config."""

    @abstractmethod
    def build(self, width: int) -> nn.Module:
        """The module: any shape whose last dimension is `width`, same shape out."""

    @abstractmethod
    def n_parameters(self, width: int) -> int:
        """Parameters of one such norm."""

    def frozen(self, norm: nn.Module, x_BTD: Tensor) -> FrozenNorm:
        """The norm that `build` made, frozen at x. Of a norm that has no such map raises `UsageError`."""
        raise UsageError(f"{type(self).__name__} has no `frozen`: the norm is not taken as a linear map at its input")


@register
@dataclass(frozen=True, kw_only=True)
class RMSNormConfig(NormConfig):
    """x / rms(x) · γ (arXiv 1910.07467).

    eps: added to the mean square.
    """

    kind: ClassVar[str] = "rmsnorm"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        require(self.eps > 0, "eps", self.eps, "must be > 0, e.g. 1e-6")

    def build(self, width: int) -> nn.Module:
        """The module, its gain at 1."""
        return RMSNorm(width, self.eps)

    def n_parameters(self, width: int) -> int:
        """Parameters of one such norm."""
        return width

    def frozen(self, norm: nn.Module, x_BTD: Tensor) -> FrozenNorm:
        """γ / rms(x)."""
        assert isinstance(norm, RMSNorm)
        return FrozenNorm(gain_BTD=norm.weight * inverse_rms(x_BTD, norm.eps))


@register
@dataclass(frozen=True, kw_only=True)
class LayerNormConfig(NormConfig):
    """(x − mean) / std · γ + β, as in GPT-2.

    eps: added to the variance.
    bias: whether there is a β.
    """

    kind: ClassVar[str] = "layernorm"
    eps: float = 1e-5
    bias: bool = True

    def __post_init__(self) -> None:
        require(self.eps > 0, "eps", self.eps, "must be > 0, e.g. 1e-5")

    def build(self, width: int) -> nn.Module:
        """The module, its gain at 1 and its bias at 0."""
        return nn.LayerNorm(width, eps=self.eps, bias=self.bias)

    def n_parameters(self, width: int) -> int:
        """Parameters of one such norm."""
        return width * (1 + self.bias)

    def frozen(self, norm: nn.Module, x_BTD: Tensor) -> FrozenNorm:
        """γ / std(x), centred."""
        assert isinstance(norm, nn.LayerNorm)
        centred_BTD = x_BTD - x_BTD.mean(dim=-1, keepdim=True)
        return FrozenNorm(gain_BTD=norm.weight * inverse_rms(centred_BTD, norm.eps), bias_D=norm.bias, centred=True)


@register
@dataclass(frozen=True, kw_only=True)
class DynamicTanhConfig(NormConfig):
    """tanh(αx)·γ + β with a learned scalar α (arXiv 2503.10622).

    alpha: initial value of α.
    """

    kind: ClassVar[str] = "dyt"
    alpha: float = 0.5

    def __post_init__(self) -> None:
        require(self.alpha > 0, "alpha", self.alpha, "must be > 0, e.g. 0.5")

    def build(self, width: int) -> nn.Module:
        """The module, its gain at 1, its bias at 0 and α at `alpha`."""
        return DynamicTanh(width, self.alpha)

    def n_parameters(self, width: int) -> int:
        """Parameters of one such norm."""
        return 2 * width + 1

    def frozen(self, norm: nn.Module, x_BTD: Tensor) -> FrozenNorm:
        """tanh(αx) / x · γ, which is αγ at x = 0."""
        assert isinstance(norm, DynamicTanh)
        ratio_BTD = torch.where(x_BTD == 0, norm.alpha, torch.tanh(norm.alpha * x_BTD) / x_BTD)
        return FrozenNorm(gain_BTD=ratio_BTD * norm.weight, bias_D=norm.bias)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / √(mean square + eps) over the last dimension, which is kept."""
    return (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt()


class RMSNorm(nn.Module):
    """x / rms(x) · γ, in the dtype of x."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Any shape whose last dimension is the width; same shape out."""
        return rms_norm(x, self.weight, self.eps)


class DynamicTanh(nn.Module):
    """tanh(αx)·γ + β, elementwise, without statistics (arXiv 2503.10622, eq. 1)."""

    def __init__(self, width: int, alpha: float) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), alpha))
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.initial_alpha = alpha

    def initializers(self) -> dict[str, Initializer]:
        """α has the config's initial value."""
        return {"alpha": constant(self.initial_alpha)}

    def forward(self, x: Tensor) -> Tensor:
        """Any shape whose last dimension is the width; same shape out."""
        return torch.tanh(self.alpha * x) * self.weight + self.bias
