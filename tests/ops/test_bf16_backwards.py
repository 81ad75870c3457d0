"""Hand-written backward passes on bf16 inputs, against float64 on the same inputs and beside PyTorch's own.

The inputs are such that a gradient is a small difference of large terms, which a pass must not take of rounded ones.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swamla.ops import chunked_cross_entropy, l2_normalize, rms_norm, short_conv
from swamla.ops.rotary import rotate

Op = Callable[..., Tensor]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def gradients(op: Op, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = op(*leaves)
    return [found.double() for found in torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


def assert_near_float64(op: Op, plain: Op, inputs: list[Tensor], upstream: Tensor) -> None:
    """Each gradient within 1 % of `plain`'s in double, or as near as `plain`'s own in bf16."""
    exact = gradients(plain, [x.double() for x in inputs], upstream)
    beside = gradients(plain, inputs, upstream)
    for mine, theirs, right in zip(gradients(op, inputs, upstream), beside, exact, strict=True):
        assert right.norm() > 0
        assert (mine - right).norm() <= max(1e-2 * right.norm(), 1.2 * (theirs - right).norm())


@pytest.mark.parametrize("along", [0.0, 10.0, 100.0])
def test_rms_norm_where_the_gradient_lies_along_the_input(along: float) -> None:
    x, weight = random(40, 64), torch.ones(64).bfloat16()
    upstream = (along * x.float() + random(40, 64, seed=1)).bfloat16()
    assert_near_float64(
        lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: F.rms_norm(x, (64,), w, 1e-6), [x, weight], upstream
    )


@pytest.mark.parametrize("along", [0.0, 10.0, 100.0])
def test_l2_normalize_where_the_gradient_lies_along_the_input(along: float) -> None:
    x = random(40, 64)
    upstream = (along * x.float() + random(40, 64, seed=1)).bfloat16()
    assert_near_float64(l2_normalize, lambda x: x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt(), [x], upstream)


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_short_conv_where_silu_is_steep_and_flat(scale: float) -> None:
    x, weight = random(2, 50, 16) * scale, random(16, 4, seed=1)

    def plain(x_BTD: Tensor, weight_DW: Tensor) -> Tensor:
        return F.silu(F.conv1d(F.pad(x_BTD.mT, (3, 0)), weight_DW[:, None], groups=16)).mT

    assert_near_float64(lambda x, w: short_conv(x, w, backend="torch"), plain, [x, weight], random(2, 50, 16, seed=2))


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_a_rotation_turns_gradients_back(layout: str) -> None:
    angle = torch.rand(1, 30, 1, 8, generator=torch.Generator().manual_seed(1)) * 6.3
    tables = (angle.cos(), angle.sin())

    def plain(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1) if layout == "half" else x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = (table.to(x.dtype) for table in tables)
        turned = (a * cos - b * sin, b * cos + a * sin)
        return torch.cat(turned, -1) if layout == "half" else torch.stack(turned, -1).flatten(-2)

    assert_near_float64(
        lambda x: rotate(x, tables, layout), plain, [random(2, 30, 3, 16)], random(2, 30, 3, 16, seed=2)
    )


@pytest.mark.parametrize("certainty", [0.0, 4.0, 8.0])
def test_cross_entropy_where_the_model_is_all_but_certain(certainty: float) -> None:
    """softmax − one-hot then is a difference of two numbers near 1."""
    weight, labels = random(50, 32), torch.arange(60) % 50
    x = (random(60, 32, seed=1).float() + certainty * F.normalize(weight.float(), dim=-1)[labels]).bfloat16()
    assert_near_float64(
        lambda x, w: chunked_cross_entropy(x, w, labels, chunk=16),
        lambda x, w: F.cross_entropy(
            (x @ w.mT).to(torch.promote_types(x.dtype, torch.float32)), labels, reduction="sum"
        ),
        [x, weight],
        torch.ones(()),
    )


def test_an_unlabelled_row_that_is_no_number_leaves_loss_and_gradients_alone() -> None:
    x, weight, labels = random(12, 8).float(), random(20, 8, seed=1).float(), torch.arange(12)
    labels[[3, 7]] = -100
    poisoned = x.clone()
    poisoned[[3, 7]] = float("nan")

    def loss(x_ND: Tensor, weight_VD: Tensor) -> Tensor:
        return chunked_cross_entropy(x_ND, weight_VD, labels, chunk=5)

    assert torch.equal(loss(poisoned, weight), loss(x, weight))
    for found, expected in zip(
        gradients(loss, [poisoned, weight], torch.ones(())), gradients(loss, [x, weight], torch.ones(())), strict=True
    ):
        assert torch.equal(found, expected)
