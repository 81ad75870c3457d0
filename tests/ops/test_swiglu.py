"""SwiGLU is its formula, outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swamla.ops.swiglu import swiglu


def formula(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 12), (7, 2), (0, 4)])
def test_outputs_and_gradients_are_those_of_the_formula_to_the_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    grad = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator, dtype=torch.float64).to(dtype)
    found = []
    for function in (swiglu, formula):
        leaf = gate_up.clone().requires_grad_()
        y = function(leaf)
        found.append((y.detach(), *torch.autograd.grad(y, leaf, grad)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_a_view_and_a_gradient_that_are_not_contiguous_change_nothing() -> None:
    wide = torch.randn(6, 4, 8).transpose(0, 1).requires_grad_()
    grad = torch.randn(4, 4, 6).transpose(1, 2)
    (ours,) = torch.autograd.grad(swiglu(wide), wide, grad)
    (theirs,) = torch.autograd.grad(formula(wide), wide, grad)
    assert torch.equal(ours, theirs)
