"""Weights rounded to int8 with one scale per row: a product with few rows reads a quarter of the bytes of fp32."""

from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 16  # PyTorch's kernel reads a row's weights 16 at a time, past the row's end if it is no multiple


@dataclass(frozen=True)
class Int8Matrix:
    """A weight (F, D) as integers in [-127, 127] times one bf16 scale per row."""

    integers_FD: Tensor
    scale_F: Tensor

    @classmethod
    def of(cls, weight_FD: Tensor) -> "Int8Matrix":
        """`weight_FD` rounded to nearest, where each row's largest magnitude becomes 127. Requires `fits`."""
        weight_FD = weight_FD.detach().float()
        scale_F = (weight_FD.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny).bfloat16()
        integers_FD = (weight_FD / scale_F[:, None].float()).round_().clamp_(-127, 127).to(torch.int8)
        return cls(integers_FD.contiguous(), scale_F)

    @staticmethod
    def fits(weight_FD: Tensor) -> bool:
        """Whether the kernel supports this weight: on a CPU, with D a multiple of 16."""
        return weight_FD.device.type == "cpu" and weight_FD.shape[1] % ALIGNMENT == 0

    def times(self, x: Tensor) -> Tensor:
        """x Wᵀ over the last dimension of x, in x's dtype; x and the result are rounded to bf16, sums in fp32."""
        y_NF = torch._weight_int8pack_mm(x.flatten(0, -2).bfloat16(), self.integers_FD, self.scale_F)
        return y_NF.to(x.dtype).unflatten(0, x.shape[:-1])
