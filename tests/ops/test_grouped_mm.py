"""Grouped products are a loop over experts, forward and backward; and tokens come back from where they were sent."""

import pytest
import torch
from torch import Tensor

from swamla.errors import UsageError
from swamla.ops import grouped_mm
from swamla.ops.dispatch import Dispatch
from swamla.ops.grouped_mm import resolve_backend

COUNTS = [(3, 0, 5, 1), (0, 0, 9, 0), (0, 2, 2, 0), (7, 0, 0, 0), (0, 0, 0, 4), (0, 0, 0, 0), (100, 1, 250, 30)]
every_count = pytest.mark.parametrize("counts", COUNTS, ids=str)
every_backend = pytest.mark.parametrize("backend", ["reference", "torch"])


def operands(counts: tuple[int, ...], width: int = 16, out: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, matrices and where the experts' rows end."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), width, generator=generator)
    weight = torch.randn(len(counts), width, out, generator=generator)
    return x, weight, torch.tensor(counts).cumsum(0).to(torch.int32)


def one_by_one(x_ND: Tensor, weight_EDF: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Every row alone."""
    expert_N = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return torch.einsum("nd,ndf->nf", x_ND, weight_EDF[expert_N])


def poison() -> None:
    """Leave NaN in the memory that the next allocations get."""
    for size in (64, 512, 4096, 20000):
        torch.full((size,), float("nan"))


@every_backend
@every_count
def test_outputs_and_gradients_are_those_of_every_row_alone(counts: tuple[int, ...], backend: str) -> None:
    x, weight, ends = operands(counts)
    upstream = torch.randn(x.shape[0], 24, generator=torch.Generator().manual_seed(1))
    results = []
    for product in (lambda a, w: one_by_one(a, w, counts), lambda a, w: grouped_mm(a, w, ends, backend=backend)):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        poison()
        y = product(*leaves)
        poison()
        y.backward(upstream)
        results.append([y.detach(), leaves[0].grad, leaves[1].grad])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@every_backend
@every_count
def test_experts_with_rows_get_a_gradient_and_those_without_get_zeros(counts: tuple[int, ...], backend: str) -> None:
    x, weight, ends = operands(counts)
    weight.requires_grad_()
    poison()
    grouped_mm(x, weight, ends, backend=backend).square().sum().backward()
    assert weight.grad is not None
    for count, gradient in zip(counts, weight.grad, strict=True):
        assert (gradient != 0).all() if count else (gradient == 0).all()


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [(3, 0, 5, 1), (0, 0, 9, 0), (0, 0)], ids=str)
def test_rows_beyond_the_last_experts_become_zero_and_change_nothing(
    counts: tuple[int, ...], dtype: torch.dtype, backend: str
) -> None:
    x, weight, ends = operands(counts)
    x, weight, surplus = x.to(dtype), weight.to(dtype), torch.full((4, x.shape[1]), 7.0, dtype=dtype)
    results = []
    for beyond in (surplus[:0], surplus):
        leaves = torch.cat([x, beyond]).requires_grad_(), weight.clone().requires_grad_()
        poison()
        y = grouped_mm(*leaves, ends, backend=backend, surplus=len(beyond) > 0)
        poison()
        y.backward(torch.ones_like(y))
        results.append([y.detach(), leaves[0].grad, leaves[1].grad])
    (y, dx, dw), (padded_y, padded_dx, padded_dw) = results
    for found, expected in ((padded_y, y), (padded_dx, dx)):
        torch.testing.assert_close(found[: len(x)], expected)
        assert torch.equal(found[len(x) :], torch.zeros_like(found[len(x) :]))
    torch.testing.assert_close(padded_dw, dw)


@every_backend
def test_operands_and_gradients_need_not_be_contiguous(backend: str) -> None:
    counts = (3, 0, 5)
    x, weight, ends = operands(counts)
    sheared = x.T.contiguous().T.requires_grad_(), weight.mT.contiguous().mT.requires_grad_()
    plain = x.clone().requires_grad_(), weight.clone().requires_grad_()
    # A sum sends back an expanded gradient of strides 0, a transpose a transposed one.
    for use in (lambda y: y.sum(), lambda y: (y.T @ torch.arange(8.0)).sum(), lambda y: y[:, ::2].sum()):
        for leaves in (sheared, plain):
            leaves[0].grad = leaves[1].grad = None
            use(grouped_mm(*leaves, ends, backend=backend)).backward()
        for a, b in zip(sheared, plain, strict=True):
            torch.testing.assert_close(a.grad, b.grad)


@every_backend
def test_only_the_gradients_that_are_wanted_are_computed(backend: str) -> None:
    x, weight, ends = operands((3, 0, 5))
    frozen = grouped_mm(x.requires_grad_(), weight, ends, backend=backend)
    assert torch.autograd.grad(frozen.sum(), x)[0].shape == x.shape
    first = grouped_mm(x.detach(), weight.requires_grad_(), ends, backend=backend)
    assert torch.autograd.grad(first.sum(), weight)[0].shape == weight.shape


@every_backend
def test_autocast_computes_in_bf16_within_a_hundredth_and_gradients_come_back_in_fp32(backend: str) -> None:
    x, weight, ends = operands((30, 0, 50, 2))
    exact = grouped_mm(x, weight, ends)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_mm(*leaves, ends, backend=backend)
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).norm() <= 1e-2 * exact.norm()
    y.float().square().sum().backward()
    wanted = x.clone().requires_grad_(), weight.clone().requires_grad_()
    grouped_mm(*wanted, ends).square().sum().backward()
    for found, expected in zip(leaves, wanted, strict=True):
        assert found.grad is not None
        assert found.grad.dtype == torch.float32
        assert (found.grad - expected.grad).norm() <= 1e-2 * expected.grad.norm()


def test_the_reference_has_the_numerical_gradient() -> None:
    x, weight, ends = operands((2, 0, 3), width=3, out=2)
    leaves = x.double().requires_grad_(), weight.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, w: grouped_mm(a, w, ends, backend="reference"), leaves)


@pytest.mark.parametrize(("width", "out", "dtype"), [(10, 24, "float32"), (16, 7, "float32"), (12, 24, "bfloat16")])
def test_rows_that_the_fast_path_cannot_take_are_refused_with_a_remedy(width: int, out: int, dtype: str) -> None:
    x, weight, ends = operands((3, 4), width, out)
    x, weight = x.to(getattr(torch, dtype)), weight.to(getattr(torch, dtype))
    with pytest.raises(UsageError, match=f'multiple of 16 bytes; these are {width} and {out} × torch.{dtype}.*"refer'):
        grouped_mm(x, weight, ends)
    assert grouped_mm(x, weight, ends, backend="reference").shape == (7, out)


def test_doubles_are_for_the_reference_and_unknown_backends_for_nobody() -> None:
    x, weight, ends = operands((3, 4))
    with pytest.raises(UsageError, match="no float64"):
        grouped_mm(x.double(), weight.double(), ends, backend="torch")
    found = grouped_mm(x.double(), weight.double(), ends)
    assert torch.equal(found, grouped_mm(x.double(), weight.double(), ends, backend="reference"))
    with pytest.raises(UsageError, match=r"'abacus'.*'auto', 'reference', 'torch'"):
        grouped_mm(x, weight, ends, backend="abacus")
    assert resolve_backend("auto") == "torch"


CHOSEN = torch.tensor([[4, 0], [1, 4], [0, 4], [2, 1], [4, 2]])  # expert 3 is chosen by nobody


def test_rows_are_sorted_by_expert_and_counted() -> None:
    dispatch = Dispatch(CHOSEN, 6)
    rows = dispatch.scatter(torch.arange(5.0)[:, None])
    assert rows.flatten().tolist() == [0, 2, 1, 3, 3, 4, 0, 1, 2, 4]  # experts 0 0 | 1 1 | 2 2 | 4 4 4 4
    assert dispatch.ends_E.tolist() == [2, 4, 6, 6, 10, 10]
    assert dispatch.ends_E.dtype == torch.int32
    assert dispatch.load_E.tolist() == [2, 2, 2, 0, 4, 0]


def test_what_is_sent_comes_back_weighted_with_the_gradients_of_plain_indexing() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, scale = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((5, 3), (5, 2), (6, 3)))
    dispatch = Dispatch(CHOSEN, 6)

    def ours(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        experts = torch.repeat_interleave(torch.arange(6), dispatch.load_E)
        return dispatch.gather(dispatch.scatter(x) * scale[experts], weight)

    def plain(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return (x[:, None] * scale[CHOSEN] * weight[..., None]).sum(1)

    results = []
    for function in (ours, plain):
        leaves = [t.clone().requires_grad_() for t in (x, weight, scale)]
        y = function(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
