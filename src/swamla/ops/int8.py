"""Weights rounded to 8 bits, one scale a row: a quarter of the bytes that a product with few rows has to read."""

from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 16  # PyTorch's kernel reads that many of a row's weights at once, and past its end if there are fewer


@dataclass(frozen=True)
class Int8Matrix:
    """A weight (F, D) as integers in [-127, 127] times a scale for each of its rows."""

    integers_FD: Tensor
    scale_F: Tensor

    @classmethod
    def of(cls, weight_FD: Tensor) -> "Int8Matrix":
        """The nearest to a weight of which `fits` is true. A row's largest number, in size, becomes ±127."""
        weight_FD = weight_FD.detach().float()
        scale_F = (weight_FD.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny).bfloat16()
        integers_FD = (weight_FD / scale_F[:, None].float()).round_().clamp_(-127, 127).to(torch.int8)
        return cls(integers_FD.contiguous(), scale_F)

    @staticmethod
    def fits(weight_FD: Tensor) -> bool:
        """Whether the kernel takes such a weight: on a CPU, its rows a multiple of 16 numbers."""
        return weight_FD.device.type == "cpu" and weight_FD.shape[1] % ALIGNMENT == 0

    def times(self, x: Tensor) -> Tensor:
        """x Wᵀ over the last dimension of x, in x's dtype; x and the result are rounded to bf16, sums are in fp32."""
        y_NF = torch._weight_int8pack_mm(x.flatten(0, -2).bfloat16(), self.integers_FD, self.scale_F)
        return y_NF.to(x.dtype).unflatten(0, x.shape[:-1])
