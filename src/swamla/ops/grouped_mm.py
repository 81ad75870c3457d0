"""Grouped matrix product: rows sorted by expert, each times its expert's matrix."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from swamla.errors import UsageError
from swamla.ops.autocast import product_dtype, without_autocast
from swamla.ops.graphs import outside_graphs

BACKENDS = ("auto", "reference", "torch")
ALIGNMENT = 16  # bytes: the torch kernel needs rows whose length is a multiple


def resolve_backend(backend: str) -> str:
    """The backend that a name means on any device: "auto" is "torch". Raises UsageError for an unknown name."""
    if backend not in BACKENDS:
        raise UsageError(f"backend = {backend!r}: grouped products have {', '.join(map(repr, BACKENDS))}")
    return "torch" if backend == "auto" else backend


def grouped_mm(
    x_ND: Tensor, weight_EDF: Tensor, ends_E: Tensor, *, backend: str = "auto", surplus: bool = False
) -> Tensor:
    """y (N, F): row n of x times the matrix of its expert.

    Expert e owns the rows ends[e − 1] … ends[e] − 1 (from 0 for the first). ends_E: int32, its last value N. With
    `surplus` it may be less: later rows are not multiplied, and their outputs and gradients are 0. Under autocast x
    and the weights are cast to its dtype. An expert without rows has zero gradients.

    Backends: "reference" (a loop over experts, synchronises with the device); "torch" (`F.grouped_mm`: needs rows that
    are multiples of 16 bytes, no fp64; its CUDA kernel is bf16, and other dtypes synchronise with the device); "auto"
    ("reference" for fp64, else "torch": on a CPU as fast as the loop, and twice as fast as padding all experts to one
    batch of equal sizes). Raises UsageError for inputs that the backend cannot compute.
    """
    if x_ND.is_meta:  # shapes only; torch's kernel knows those of bf16 alone
        return x_ND.to(product_dtype(x_ND)) @ weight_EDF[0].to(product_dtype(x_ND))
    if x_ND.device.type == "cpu" or backend == "reference" or product_dtype(x_ND) != torch.bfloat16:
        return _outside(x_ND, weight_EDF, ends_E, backend, surplus)  # the compiler has a kernel for bf16 only
    return _grouped_mm(x_ND, weight_EDF, ends_E, backend, surplus)


def reference_grouped_mm(x_ND: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """y (N, F): rows ends[e − 1] … ends[e] − 1 of x times the matrix of expert e; rows without an expert become 0."""
    begins, ends = [0, *ends_E.tolist()[:-1]], ends_E.tolist()
    with without_autocast(x_ND.device.type):
        products = [x_ND[b:e] @ weight for b, e, weight in zip(begins, ends, weight_EDF.unbind(), strict=True)]
    return torch.cat([*products, products[0].new_zeros(len(x_ND) - ends[-1], weight_EDF.shape[2])])


def _grouped_mm(x_ND: Tensor, weight_EDF: Tensor, ends_E: Tensor, backend: str, surplus: bool) -> Tensor:
    dtype = product_dtype(x_ND)
    x_ND, weight_EDF = x_ND.to(dtype), weight_EDF.to(dtype)
    if resolve_backend(backend) == "reference" or (backend == "auto" and dtype == torch.float64):
        return reference_grouped_mm(x_ND, weight_EDF, ends_E)
    _, width, out_width = weight_EDF.shape
    if dtype == torch.float64 or width * dtype.itemsize % ALIGNMENT or out_width * dtype.itemsize % ALIGNMENT:
        raise UsageError(
            f'backend = "torch": grouped products take no float64, and rows of a multiple of {ALIGNMENT} bytes; these '
            f'are {width} and {out_width} × {dtype}: use "reference"'
        )
    if not len(x_ND):  # F.grouped_mm refuses zero rows
        return reference_grouped_mm(x_ND, weight_EDF, ends_E)
    return _GroupedMM.apply(x_ND, weight_EDF, ends_E, surplus)


_outside = outside_graphs(_grouped_mm)


def _clear_surplus(y: Tensor, ends_E: Tensor) -> None:
    """Set rows after those of the last expert to 0: the kernel leaves them uninitialised."""
    if y.device.type == "cpu":
        y[int(ends_E[-1]) :] = 0
    else:  # without a device synchronisation
        y.masked_fill_((torch.arange(len(y), device=y.device) >= ends_E[-1])[:, None], 0)


class _GroupedMM(torch.autograd.Function):
    """`F.grouped_mm` with its own backward pass, because PyTorch's fails on non-contiguous gradients."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_EDF: Tensor, ends_E: Tensor, surplus: bool) -> Tensor:
        x_ND = x_ND.contiguous()
        ctx.save_for_backward(x_ND, weight_EDF, ends_E)
        ctx.surplus = surplus
        y_NF = F.grouped_mm(x_ND, weight_EDF, offs=ends_E)
        if surplus:
            _clear_surplus(y_NF, ends_E)
        return y_NF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_EDF, ends_E = ctx.saved_tensors
        grad_NF, dx_ND, dw_EDF = grad_NF.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            dx_ND = F.grouped_mm(grad_NF, weight_EDF.mT, offs=ends_E)
            if ctx.surplus:
                _clear_surplus(dx_ND, ends_E)
        if ctx.needs_input_grad[1]:
            dw_EDF = F.grouped_mm(x_ND.mT, grad_NF, offs=ends_E)
            if dw_EDF.device.type != "cpu":  # only the CPU kernel is known to write zeros for experts without rows
                empty_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
                dw_EDF.masked_fill_(empty_E[:, None, None], 0)
        return dx_ND, dw_EDF, None, None
