"""Moments kept in fewer bits than they are computed in: bf16 by stochastic rounding, 8 bits by torchao's map."""

import logging
import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from swamla.errors import MissingBackendError
from swamla.train.optim.named import Held, Shape

Moments = Literal["fp32", "bf16", "8bit"]
BLOCK = 256  # numbers that share a scale, as in torchao


class Moment(Protocol):
    """A moment in whatever format it is kept."""

    def read(self) -> Tensor:
        """Its value in fp32, to be changed in place and written back."""

    def write(self, value: Tensor) -> None:
        """Keep a value that `read` gave; the value is spent."""

    def piece(self, start: int, stop: int) -> "Moment":
        """Some of its numbers, flat; both ends are multiples of `BLOCK`, or the tensor's own end."""


def held_moment(name: str, shape: Shape, moments: Moments) -> dict[str, Held]:
    """The tensors that keep one moment. Of 8 bits are those that torchao too would keep so: whole blocks, not small."""
    numbers = math.prod(shape)
    if moments == "8bit" and numbers >= 4096 and numbers % BLOCK == 0:
        return {f"{name}.codes": Held(shape, torch.uint8), f"{name}.scale": Held((numbers // BLOCK,))}
    return {name: Held(shape, torch.bfloat16 if moments == "bf16" else torch.float32)}


def moment_in(state: dict[str, Tensor], name: str, *, signed: bool, noise: torch.Generator) -> Moment:
    """The moment that `state` keeps under `name`, flat. noise: what bf16 is rounded by."""
    if name not in state:
        return EightBit(state[f"{name}.codes"].view(-1), state[f"{name}.scale"], signed)
    tensor = state[name].view(-1)
    return Bf16(tensor, noise) if tensor.dtype == torch.bfloat16 else Fp32(tensor)


@dataclass(frozen=True)
class Fp32:
    """Kept as it is."""

    tensor: Tensor

    def read(self) -> Tensor:
        return self.tensor

    def write(self, value: Tensor) -> None:
        assert value is self.tensor

    def piece(self, start: int, stop: int) -> Moment:
        return Fp32(self.tensor[start:stop])


@dataclass(frozen=True)
class Bf16:
    """Rounded up or down at random, on average to the value itself, so that small increments are not lost."""

    tensor: Tensor
    noise: torch.Generator

    def read(self) -> Tensor:
        return self.tensor.float()

    def write(self, value: Tensor) -> None:
        self.tensor.copy_(round_stochastically_(value, self.noise))

    def piece(self, start: int, stop: int) -> Moment:
        return Bf16(self.tensor[start:stop], self.noise)


def round_stochastically_(value: Tensor, noise: torch.Generator) -> Tensor:
    """Move each fp32 number to one of the two bf16 numbers around it, in place, the nearer one more often.

    The probabilities are those that make the mean the number itself. Infinities stay what they are.
    """
    # bf16 is the upper half of fp32: adding 16 random bits to the lower half carries with just that probability.
    drawn = torch.empty((value.numel() + 3) // 4, dtype=torch.int64, device=value.device)
    drawn.random_(-(2**63), None, generator=noise)
    random16 = drawn.view(torch.int16)[: value.numel()].view(value.shape).int().bitwise_and_(0xFFFF)
    value.view(torch.int32).add_(random16).bitwise_and_(-0x10000)
    return value


@dataclass(frozen=True)
class EightBit:
    """Blocks of 256 numbers, each a code into a fixed map times the block's largest magnitude (arXiv 2110.02861)."""

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

    def piece(self, start: int, stop: int) -> Moment:
        return EightBit(self.codes[start:stop], self.scale[start // BLOCK : stop // BLOCK], self.signed)


@cache
def _maps(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 256 values of torchao's map, ascending, and the numbers half-way between neighbours."""
    values = require_torchao().zeros((BLOCK,), signed, BLOCK, device).qmap
    return values, (values[1:] + values[:-1]) / 2


@cache
def require_torchao() -> Any:
    """torchao's 8-bit tensor. Raises `MissingBackendError`, with the command that installs it."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # its import warns of its GPU kernels, which are not used here
    try:
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise MissingBackendError("moments = 8bit needs torchao: pip install 'swamla[fp8]'") from error
    finally:
        logging.disable(level)
    return OptimState8bit
