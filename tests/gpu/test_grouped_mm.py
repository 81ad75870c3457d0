"""Grouped products on a GPU against a loop over the experts."""

import pytest
import torch

from swamla.ops import grouped_mm
from tests.gpu.checks import assert_parity, no_waiting, poison, randn

pytestmark = pytest.mark.gpu

COUNTS = [(3, 0, 5, 1), (0, 0, 9, 0), (7, 0, 0, 0), (0, 0, 0, 4), (0, 0, 0, 0), (100, 1, 250, 30), (64, 64, 64, 64)]
every_count = pytest.mark.parametrize("counts", COUNTS, ids=str)


def operands(counts, width=64, out=96, dtype=torch.bfloat16):
    ends = torch.tensor(counts).cumsum(0).to("cuda", torch.int32)
    return randn(sum(counts), width, dtype=dtype), randn(len(counts), width, out, dtype=dtype, seed=1), ends


def product(ends, backend):
    return lambda x, weight: [grouped_mm(x, weight, ends, backend=backend)]


@every_count
@pytest.mark.parametrize(("width", "out"), [(64, 96), (8, 8), (256, 24)])
def test_outputs_and_gradients_are_those_of_the_loop(counts, width, out):
    x, weight, ends = operands(counts, width, out)
    assert_parity(product(ends, "torch"), product(ends, "reference"), [x, weight])


@every_count
def test_an_expert_without_rows_gets_zeros(counts):
    x, weight, ends = operands(counts)
    weight.requires_grad_()
    poison()
    grouped_mm(x, weight, ends).float().square().sum().backward()
    for count, gradient in zip(counts, weight.grad, strict=True):
        assert gradient.isfinite().all()
        assert (gradient != 0).any() == bool(count)


def test_operands_and_gradients_need_not_be_contiguous():
    x, weight, ends = operands((30, 0, 50))
    sheared = x.T.contiguous().T.requires_grad_(), weight.mT.contiguous().mT.requires_grad_()
    plain = x.clone().requires_grad_(), weight.clone().requires_grad_()
    for use in (lambda y: y.sum(), lambda y: (y.T @ torch.ones(80, device="cuda", dtype=y.dtype)).sum()):
        for leaves in (sheared, plain):
            leaves[0].grad = leaves[1].grad = None
            use(grouped_mm(*leaves, ends)).backward()
        for a, b in zip(sheared, plain, strict=True):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-2, rtol=1e-2)


def test_autocast_computes_in_bf16_and_gradients_come_back_in_fp32():
    x, weight, ends = operands((30, 0, 50, 2), dtype=torch.float32)

    def autocast(x, weight):
        with torch.autocast("cuda", torch.bfloat16):
            y = grouped_mm(x, weight, ends)
        assert y.dtype == torch.bfloat16
        return [y]

    assert_parity(autocast, product(ends, "reference"), [x, weight], tolerance=2e-2)


def test_the_host_does_not_wait():
    x, weight, ends = operands((30, 0, 50, 2))
    for leaf in (x, weight):
        leaf.requires_grad_()
    grouped_mm(x, weight, ends).sum().backward()
    with no_waiting():
        grouped_mm(x, weight, ends).sum().backward()
