"""Rotary position embedding (RoFormer, arXiv 2104.09864): rotates pairs of a head's elements by position."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from swamla.ops.graphs import in_dtype_of, is_fused, outside_graphs

FEW = 2**14  # elements up to which, without gradients, blocks cost more than they save
CPU_BLOCK = 200_000  # elements of a block on a CPU: with its fp32 copies it fits the cache

Tables = tuple[Tensor, Tensor]


def rotate(x_BTHK: Tensor, tables: Tables, layout: str) -> Tensor:
    """Rotate the last 2 · pairs elements of each head: same shape and dtype, fp32 inside (arXiv 2104.09864, eq. 34).

    tables: cos and sin, each (B or 1, T, 1, pairs).  layout: "half" pairs the rotated element i with i + pairs,
    "interleaved" 2i with 2i + 1.
    """
    return rotate_doubled(x_BTHK, doubled(tables, layout), layout)


def doubled(tables: Tables, layout: str) -> Tables:
    """The tables of `rotate_doubled`, (B or 1, T, 1, 2 · pairs): each element's cos, and its partner's signed sin."""
    cos, sin = (_both(table, layout) for table in tables)
    return cos, _partners(sin, layout, sign=-1)


def rotate_doubled(x_BTHK: Tensor, tables: Tables, layout: str) -> Tensor:
    """`rotate` with tables from `doubled`, for callers that rotate many tensors by the same angles."""
    cos, sin = tables
    if is_fused(x_BTHK):
        return _RotateInGraph.apply(x_BTHK, cos, sin, layout)
    plain = x_BTHK.device.type != "cpu" or torch.compiler.is_exporting()
    if plain or (x_BTHK.numel() <= FEW and not torch.is_grad_enabled()):
        return _rotated(x_BTHK, cos, sin, layout)
    return _in_blocks(x_BTHK, cos, sin, layout)


def reference_rotate(x_BTHK: Tensor, tables: Tables, layout: str) -> Tensor:
    """(a, b) ↦ (a cos − b sin, b cos + a sin) for each pair of x (B, T, H, 2 · pairs)."""
    cos, sin = tables
    pairs = x_BTHK.unflatten(-1, (2, -1) if layout == "half" else (-1, 2))
    a, b = pairs.unbind(-2 if layout == "half" else -1)
    rotated = (a * cos - b * sin, b * cos + a * sin)
    return torch.stack(rotated, dim=-2 if layout == "half" else -1).flatten(-2).to(x_BTHK.dtype)


def _both(table: Tensor, layout: str) -> Tensor:
    """Repeat each pair's entry for both of its elements."""
    return torch.cat((table, table), dim=-1) if layout == "half" else table.repeat_interleave(2, dim=-1)


def _partners(x: Tensor, layout: str, sign: int = 1) -> Tensor:
    """Each element's partner in its pair, times `sign` for the first element of a pair."""
    if layout == "half":
        a, b = x.chunk(2, dim=-1)
        return torch.cat((b if sign == 1 else b * sign, a), dim=-1)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((b if sign == 1 else b * sign, a), dim=-1).flatten(-2)


def _rotated(x_BTHK: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Whole heads by tables as wide, so that a compiler makes one pass of it: what is not rotated has the angle 0."""
    still, wide = x_BTHK.shape[-1] - cos.shape[-1], x_BTHK.to(torch.promote_types(x_BTHK.dtype, cos.dtype))
    partners = _partners(wide[..., still:], layout)
    if still:
        cos, sin = F.pad(cos, (still, 0), value=1.0), F.pad(sin, (still, 0))
        partners = torch.cat((wide[..., :still], partners), dim=-1)
    return in_dtype_of(x_BTHK, torch.addcmul(wide * cos, partners, sin))


class _RotateInGraph(torch.autograd.Function):
    """For graphs: the compiler's own derivative of the partners' concatenation moves three times the bytes."""

    @staticmethod
    def forward(ctx: Any, x_BTHK: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.layout = layout
        return _rotated(x_BTHK, cos, sin, layout)

    @staticmethod
    def backward(ctx: Any, grad_BTHK: Tensor) -> tuple[Tensor | None, ...]:
        """The rotation the other way round."""
        cos, sin = ctx.saved_tensors
        return _rotated(grad_BTHK, cos, -sin, ctx.layout), None, None, None


@outside_graphs
def _in_blocks(x_BTHK: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    return _Rotate.apply(x_BTHK, cos, sin, layout)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTHK: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.layout = layout
        return _rotate_blocks(x_BTHK, cos, sin, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHK: Tensor) -> tuple[Tensor | None, ...]:
        """The rotation by the negative angle."""
        cos, sin = ctx.saved_tensors
        return _rotate_blocks(grad_BTHK, cos, -sin, ctx.layout), None, None, None


def _rotate_blocks(x_BTHK: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    y_BTHK = torch.empty_like(x_BTHK, memory_format=torch.contiguous_format)
    unrotated, (batch, time, heads, _) = x_BTHK.shape[-1] - cos.shape[-1], x_BTHK.shape
    y_BTHK[..., :unrotated] = x_BTHK[..., :unrotated]
    size = max(1, CPU_BLOCK // (batch * heads * cos.shape[-1]))
    for start in range(0, time, size):
        block = slice(start, start + size)
        wide = x_BTHK[:, block, :, unrotated:].to(torch.promote_types(x_BTHK.dtype, cos.dtype))
        rotated = wide * cos[:, block]
        for own, partner in _pairs(layout, cos.shape[-1]):
            rotated[..., own].addcmul_(wide[..., partner], sin[:, block, :, own])
        y_BTHK[:, block, :, unrotated:] = rotated
    return y_BTHK


def _pairs(layout: str, width: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The first elements of all pairs and the second, in both orders."""
    half = width // 2
    first, second = (slice(half), slice(half, None)) if layout == "half" else (slice(0, None, 2), slice(1, None, 2))
    return (first, second), (second, first)
