"""RMSNorm is its formula, outputs and gradients."""

import pytest
import torch
from torch import Tensor

from swamla.ops import rms_norm


def formula(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight_D


@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 4, 8), (7,), (0, 4)])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_outputs_and_gradients_are_those_of_the_formula(shape: tuple[int, ...], eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    results = []
    for norm in (formula, rms_norm):
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = norm(*inputs, eps)
        results.append((y.detach(), *torch.autograd.grad(y, inputs, grad)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_view_that_is_not_contiguous_is_normalised_like_its_copy() -> None:
    x = torch.randn(4, 6, 8).transpose(0, 1)[:, ::2].requires_grad_()
    copy = x.detach().clone().requires_grad_()
    weight = torch.randn(8)
    rms_norm(x, weight, 1e-6).pow(2).sum().backward()
    rms_norm(copy, weight, 1e-6).pow(2).sum().backward()
    torch.testing.assert_close(x.grad, copy.grad)


def test_bf16_in_is_bf16_out_within_a_hundredth_of_fp32() -> None:
    x = torch.randn(64, 32)
    low = x.bfloat16().requires_grad_()
    weight = torch.randn(32, requires_grad=True)
    y = rms_norm(low, weight, 1e-6)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    exact = formula(low.detach().float(), weight.detach(), 1e-6)
    assert (y.float() - exact).norm() <= 1e-2 * exact.norm()


def test_zeros_stay_zeros_with_finite_gradients() -> None:
    x = torch.zeros(3, 8, requires_grad=True)
    y = rms_norm(x, torch.ones(8), 1e-6)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(3, 8))
    assert x.grad is not None
    assert x.grad.isfinite().all()
