"""Weights stored as integers times scales in bf16: of 8 bits with one scale per row, of 4 bits with one per 32 weights.

A row is the last dimension. Int8 rounds as `ops/int8.py` does for decoding, so that decoding in int8 finds the stored
integers again. Int4 has the scale of least squared error for each group of a row.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from swamla.ops.int8 import Int8Matrix

FORMATS = ("int8", "int4")
GROUP = 32  # weights that share a scale in int4
LOWEST, HIGHEST = -8, 7  # integers of 4 bits; stored without sign, from 0 to 15, the first of two in the low half
AT_ONCE = 1 << 14  # groups whose scales are searched together, which bounds memory to some 30 MB

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rounded:
    """A weight of `shape`. integers: of that shape in int8; in int4 two in a byte, rows filled up to whole groups.

    scale: one per row, `shape[:-1]`; in int4 one per group, `(*shape[:-1], groups)`.
    """

    format: str
    integers: Tensor
    scale: Tensor
    shape: Shape

    @classmethod
    def of(cls, weight: Tensor, format: str) -> "Rounded":
        """The nearest weight of a format, "int8" or "int4". Requires finite values and two dimensions at least."""
        shape = tuple(weight.shape)
        rows = weight.detach().to("cpu", torch.float32).flatten(0, -2)
        if format == "int8":
            matrix = Int8Matrix.of(rows)
            return cls(format, matrix.integers_FD.view(shape), matrix.scale_F.view(shape[:-1]), shape)
        groups = F.pad(rows, (0, -rows.shape[1] % GROUP)).view(-1, GROUP)
        scale = torch.cat([least_squares_scale(part) for part in groups.split(AT_ONCE)]).bfloat16()
        integers = groups / scale.float().where(scale != 0, 1.0)[:, None]
        stored = integers.round_().clamp_(LOWEST, HIGHEST).sub_(LOWEST).to(torch.uint8)
        packed = stored[:, 0::2] | stored[:, 1::2] << 4
        return cls(format, packed.view(*shape[:-1], -1), scale.view(*shape[:-1], -1), shape)

    @staticmethod
    def parts(shape: Shape, format: str) -> tuple[tuple[torch.dtype, Shape], tuple[torch.dtype, Shape]]:
        """dtype and shape of the integers and of the scales of a weight of `shape`."""
        *rows, width = shape
        if format == "int8":
            return (torch.int8, shape), (torch.bfloat16, (*rows,))
        groups = -(-width // GROUP)
        return (torch.uint8, (*rows, groups * GROUP // 2)), (torch.bfloat16, (*rows, groups))

    def checked(self) -> "Rounded":
        """Itself. Raises `ValueError` unless integers and scales have the dtypes and shapes of the format."""
        found = tuple((part.dtype, tuple(part.shape)) for part in (self.integers, self.scale))
        expected = self.parts(self.shape, self.format)
        if found != expected:
            raise ValueError(f"{self.format} weights of {self.shape} are stored as {found}, expected {expected}")
        return self

    def weight(self) -> Tensor:
        """Integers times scales, in fp32."""
        if self.format == "int8":
            return self.integers.float() * self.scale.float()[..., None]
        scale = self.scale.float().repeat_interleave(GROUP, dim=-1)[..., : self.shape[-1]]
        return self.plain_integers().float() * scale

    def plain_integers(self) -> Tensor:
        """The integers as int8, one in a byte, of the weight's shape."""
        if self.format == "int8":
            return self.integers
        pairs = torch.stack((self.integers & 15, self.integers >> 4), dim=-1)
        return (pairs.flatten(-2).to(torch.int8) + LOWEST)[..., : self.shape[-1]].contiguous()


def rounded_bytes(shape: Shape, format: str) -> int:
    """Bytes of a weight of `shape` in a format, scales included."""
    return sum(dtype.itemsize * torch.Size(part).numel() for dtype, part in Rounded.parts(shape, format))


def least_squares_scale(w_NG: Tensor) -> Tensor:
    """Scales (N,) in fp32, of either sign, that minimise Σ (w − s · q)² over all s and all integers q in [−8, 7].

    As s falls from ∞, one integer after the other grows by 1, where |w| / s passes a half. For the integers between two
    such events the best s is (w · q) / (q · q), and reduces the error by (w · q)² / (q · q): the largest reduction of
    all events is that of the best s. A group of zeros has the scale 0.
    """
    most = -LOWEST
    size_NG = w_NG.abs()
    step = torch.arange(1, most + 1, dtype=w_NG.dtype)
    at_NE, event_NE = (size_NG[..., None] / (step - 0.5)).flatten(1).sort(dim=1, descending=True)
    which_NE, reached_NE = event_NE // most, event_NE % most + 1
    w_NE, size_NE = w_NG.gather(1, which_NE), size_NG.gather(1, which_NE)
    best_N, scale_N = w_NG.new_zeros(len(w_NG)), w_NG.new_zeros(len(w_NG))
    for sign in (1, -1):
        # Only weights against the sign of the scale have an eighth step.
        grows_NE = (at_NE > 0) & ((reached_NE < most) | (w_NE * sign < 0))
        dot_NE = size_NE.where(grows_NE, 0).cumsum(1)
        square_NE = (2.0 * reached_NE - 1).where(grows_NE, 0).cumsum(1).clamp(min=1)
        reduction_N, event_N = (dot_NE.square() / square_NE).max(dim=1)
        found_N = sign * (dot_NE / square_NE).gather(1, event_N[:, None]).squeeze(1)
        scale_N = torch.where(reduction_N > best_N, found_N, scale_N)
        best_N = torch.maximum(best_N, reduction_N)
    return scale_N
