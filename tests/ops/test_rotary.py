"""Rotary positions: the fast path is the reference, in outputs and gradients."""

import pytest
import torch
from torch import Tensor

from swamla.ops import rotary
from swamla.ops.rotary import reference_rotate, rotate

layouts = pytest.mark.parametrize("layout", ["half", "interleaved"])


def tables(batch: int, time: int, pairs: int) -> tuple[Tensor, Tensor]:
    angle = torch.rand(batch, time, 1, pairs, generator=torch.Generator().manual_seed(1)) * 100
    return angle.cos(), angle.sin()


def heads(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


def gradient(y: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(y, x, torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype))[0]


@layouts
@pytest.mark.parametrize("rows", [1, 3], ids=["one table for all rows", "a table for every row"])
@pytest.mark.parametrize("block", [1, 1000, 10**9], ids=["a token a block", "some tokens a block", "one block"])
def test_any_blocks_turn_as_the_reference_does(
    layout: str, rows: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotary, "CPU_BLOCK", block)
    x, angles = heads(3, 37, 4, 16), tables(rows, 37, 8)
    found, expected = rotate(x, angles, layout), reference_rotate(x, angles, layout)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient(found, x), gradient(expected, x), atol=1e-6, rtol=0)


@layouts
def test_only_the_end_of_a_head_turns_where_there_are_fewer_angles(layout: str) -> None:
    x, angles = heads(2, 9, 3, 22), tables(1, 9, 4)
    found = rotate(x, angles, layout)
    expected = torch.cat((x[..., :14], reference_rotate(x[..., 14:], angles, layout)), dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient(found, x), gradient(expected, x), atol=1e-6, rtol=0)


@layouts
def test_a_strided_view_of_a_projection_turns_as_its_copy_does(layout: str) -> None:
    x, angles = heads(2, 9, 5, 16), tables(2, 9, 8)
    view = x[:, :, 1:4]
    assert torch.equal(rotate(view, angles, layout), rotate(view.contiguous(), angles, layout))


@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_number_formats_are_turned_in_fp32_or_double_and_kept(layout: str, dtype: torch.dtype) -> None:
    x, angles = heads(2, 9, 3, 16, dtype=dtype), tables(1, 9, 8)
    found, exact = rotate(x, angles, layout), reference_rotate(x.double(), angles, layout)
    assert found.dtype == dtype
    assert (found.double() - exact).norm() <= (5e-3 if dtype == torch.bfloat16 else 1e-7) * exact.norm()


@layouts
@pytest.mark.parametrize("angles", [8, 4], ids=["whole heads", "the end of a head"])
def test_what_a_graph_on_a_gpu_holds_turns_as_the_reference_does(
    layout: str, angles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotary, "is_fused", lambda x: True)
    x, table = heads(2, 9, 3, 16), tables(1, 9, angles)
    still = 16 - 2 * angles
    torch._dynamo.reset()
    compiled = torch.compile(rotate, backend="aot_eager", fullgraph=True)
    for found in (rotate(x, table, layout), compiled(x, table, layout)):
        expected = torch.cat((x[..., :still], reference_rotate(x[..., still:], table, layout)), dim=-1)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(gradient(found, x), gradient(expected, x), atol=1e-6, rtol=0)
