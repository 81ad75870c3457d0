"""What the tests of causal and of windowed attention share."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from swamla.ops import causal_attention, windowed_attention
from swamla.ops.layout import Layout

Attention = Callable[..., Tensor]
TOLERANCE = {torch.float64: (1e-11, 1e-10), torch.float32: (1e-5, 1e-4)}  # outputs, gradients


def attention(window: int | None = None, sinks: int = 0) -> Attention:
    """Causal attention, or windowed when there is a window."""
    return causal_attention if window is None else partial(windowed_attention, window=window, sinks=sinks)


def with_sink_logit(attend: Attention) -> Attention:
    """The same of queries, keys, values and sink logits."""

    def attend_besides(q: Tensor, k: Tensor, v: Tensor, sink_logit_H: Tensor, seq: Layout, **settings: Any) -> Tensor:
        return attend(q, k, v, seq, sink_logit_H=sink_logit_H, **settings)

    return attend_besides


def random_logits(heads: int, dtype=torch.float32) -> Tensor:
    """(H,), as large as scores may be."""
    return (3 * torch.randn(heads, generator=torch.Generator().manual_seed(3), dtype=dtype)).requires_grad_()


def random_inputs(seq: Layout, *, heads: int = 2, groups: int = 2, key: int = 8, value: int = 8, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = [(heads, key), (groups, key), (groups, value)]
    return [torch.randn(*seq.shape, *shape, dtype=dtype, requires_grad=True) for shape in shapes]


def documents(*rows: list[int]) -> Layout:
    """A layout of rows, each given by the lengths of its documents."""
    tokens = [[document for document, length in enumerate(row) for _ in range(length)] for row in rows]
    return Layout.from_documents(torch.tensor(tokens))


def random_layout(seed: int, batch: int = 2, time: int = 300) -> Layout:
    """Documents of any length, often one token, often ending in padding."""
    generator = torch.Generator().manual_seed(seed)
    mean = int(torch.randint(1, time, (1,), generator=generator))
    document_BT = (torch.rand(batch, time, generator=generator) < 1 / mean).cumsum(dim=1)
    document_BT[seed % batch, time - seed % 7 :] = -1
    return Layout.from_documents(document_BT)


def with_gradients(attend: Attention, inputs: list[Tensor], seq: Layout) -> list[Tensor]:
    """The output and its gradients for a fixed upstream gradient."""
    output = attend(*inputs, seq)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output, *torch.autograd.grad(output, inputs, upstream)]


def assert_equals_reference(attend: Attention, inputs: list[Tensor], seq: Layout) -> None:
    expected = with_gradients(partial(attend, backend="reference"), inputs, seq)
    outputs, gradients = TOLERANCE[inputs[0].dtype]
    for backend in ("torch", "tiles", "sdpa"):
        got = with_gradients(partial(attend, backend=backend), inputs, seq)
        tolerances = [outputs, *[gradients] * len(inputs)]
        for tolerance, mine, theirs in zip(tolerances, got, expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)


def assert_close_in_bf16(attend: Attention, inputs: list[Tensor], seq: Layout) -> None:
    """‖out − ref‖ ≤ 1e-2 ‖ref‖ against the fp32 reference on the same bf16 inputs, gradients too."""
    exact = [x.detach().float().requires_grad_() for x in inputs]
    expected = with_gradients(partial(attend, backend="reference"), exact, seq)
    for mine, theirs in zip(with_gradients(attend, inputs, seq), expected, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.float() - theirs).norm() <= 1e-2 * theirs.norm()
