"""Moments stored in fewer bits: bf16 with stochastic rounding, 8 bits with torchao's map."""

import logging
import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from swamla.errors import MissingBackendError
from swamla.train.optim.named import Shape, StateTensor

Moments = Literal["fp32", "bf16", "8bit"]
BLOCK = 256  # numbers that share a scale, as in torchao


class Moment(Protocol):
    """A moment in its storage format."""

    def read(self) -> Tensor:
        """The value in fp32, to be changed in place and written back."""

    def write(self, value: Tensor) -> None:
        """Store a value from `read`; the value may be overwritten."""

    def chunk(self, start: int, stop: int) -> "Moment":
        """A flat slice; both ends are multiples of `BLOCK`, or the tensor's own end."""


def moment_specs(name: str, shape: Shape, moments: Moments) -> dict[str, StateTensor]:
    """The tensors that store one moment. As in torchao, 8 bits need whole blocks and at least 4096 numbers."""
    numbers = math.prod(shape)
    if moments == "8bit" and numbers >= 4096 and numbers % BLOCK == 0:
        return {f"{name}.codes": StateTensor(shape, torch.uint8), f"{name}.scale": StateTensor((numbers // BLOCK,))}
    return {name: StateTensor(shape, torch.bfloat16 if moments == "bf16" else torch.float32)}


def moment_in(state: dict[str, Tensor], name: str, *, signed: bool, noise: torch.Generator) -> Moment:
    """The moment `name` in `state`, flat. noise: the generator for rounding to bf16."""
    if name not in state:
        return EightBit(state[f"{name}.codes"].view(-1), state[f"{name}.scale"], signed)
    tensor = state[name].view(-1)
    return Bf16(tensor, noise) if tensor.dtype == torch.bfloat16 else Fp32(tensor)


@dataclass(frozen=True)
class Fp32:
    """A moment in fp32."""

    tensor: Tensor

    def read(self) -> Tensor:
        return self.tensor

    def write(self, value: Tensor) -> None:
        assert value is self.tensor

    def chunk(self, start: int, stop: int) -> Moment:
        return Fp32(self.tensor[start:stop])


@dataclass(frozen=True)
class Bf16:
    """A moment in bf16, rounded stochastically so that small increments are not lost."""

    tensor: Tensor
    noise: torch.Generator

    def read(self) -> Tensor:
        return self.tensor.float()

    def write(self, value: Tensor) -> None:
        self.tensor.copy_(round_stochastically_(value, self.noise))

    def chunk(self, start: int, stop: int) -> Moment:
        return Bf16(self.tensor[start:stop], self.noise)


def round_stochastically_(value: Tensor, noise: torch.Generator) -> Tensor:
    """Stochastic rounding, in place: each fp32 number becomes one of its two bf16 neighbours, unbiased.

    Infinities stay infinite.
    """
    # bf16 is the upper half of fp32: adding 16 random bits to the lower half carries with the right probability.
    drawn = torch.empty((value.numel() + 3) // 4, dtype=torch.int64, device=value.device)
    drawn.random_(-(2**63), None, generator=noise)
    random16 = drawn.view(torch.int16)[: value.numel()].view(value.shape).int().bitwise_and_(0xFFFF)
    value.view(torch.int32).add_(random16).bitwise_and_(-0x10000)
    return value


@dataclass(frozen=True)
class EightBit:
    """A moment in 8 bits: codes into a fixed map, scaled by the largest magnitude of 256 numbers (arXiv 2110.02861)."""

    codes: Tensor
    scale: Tensor
    signed: bool

    def read(self) -> Tensor:
        values, _ = _maps(self.signed, self.codes.device)
        blocks = values.index_select(0, self.codes.int()).view(-1, BLOCK)
        return blocks.mul_(self.scale[:, None]).view(-1)

    def write(self, value: Tensor) -> None:
        _, middles = _maps(self.signed, self.codes.device)
        blocks = value.view(-1, BLOCK)
        torch.amax(blocks.abs(), -1, out=self.scale).clip_(1e-12)
        nearest = torch.bucketize(blocks / self.scale[:, None], middles, out_int32=True, right=True)
        self.codes.copy_(nearest.view(-1))

    def chunk(self, start: int, stop: int) -> Moment:
        return EightBit(self.codes[start:stop], self.scale[start // BLOCK : stop // BLOCK], self.signed)


@cache
def _maps(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 256 values of torchao's map, ascending, and the midpoints between neighbours."""
    values = require_torchao().zeros((BLOCK,), signed, BLOCK, device).qmap
    return values, (values[1:] + values[:-1]) / 2


@cache
def require_torchao() -> Any:
    """torchao's 8-bit tensor. Raises `MissingBackendError`, with the command that installs it."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # importing it warns about GPU kernels that are not used here
    try:
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise MissingBackendError("moments = 8bit needs torchao: pip install 'swamla[fp8]'") from error
    finally:
        logging.disable(disabled)
    return OptimState8bit
