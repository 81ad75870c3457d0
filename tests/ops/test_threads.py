"""What several threads compute is what one computes, in autocast or not: the suite itself runs with one."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from swamla.ops import chunked_cross_entropy, gated_delta_rule, l2_normalize, short_conv
from swamla.ops.attention import causal_attention, windowed_attention
from swamla.ops.layout import Layout
from swamla.ops.rms_norm import rms_norm

B, T, D = 2, 600, 512  # large enough that every op leaves its work to several threads
DOCUMENT_BT = torch.arange(T).expand(B, T) // 250
Op = Callable[..., Tensor]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def convolution(x_BTD: Tensor, weight_DW: Tensor) -> Tensor:
    return short_conv(x_BTD, weight_DW, seq=Layout.from_documents(DOCUMENT_BT))


def rule(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    seq = Layout.from_documents(DOCUMENT_BT)
    return gated_delta_rule(l2_normalize(q), l2_normalize(k), v, -gate.float().abs(), gate.float().sigmoid(), seq=seq)[
        0
    ]


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str, window: int | None = None) -> Tensor:
    seq = Layout.from_documents(DOCUMENT_BT)
    if window is None:
        return causal_attention(q, k, v, seq, backend=backend)
    return windowed_attention(q, k, v, seq, window=window, sinks=4, backend=backend)


def loss(x_ND: Tensor, weight_VD: Tensor) -> Tensor:
    return chunked_cross_entropy(x_ND, weight_VD, torch.arange(len(x_ND)) % len(weight_VD))


HEADS = [random(B, T, 4, 64 + i) for i in (0, 0, 1)]
OPS: dict[str, tuple[Op, list[Tensor]]] = {
    "short convolution": (convolution, [random(B, T, D), random(D, 4)]),
    "delta rule": (rule, [*HEADS, random(B, T, 4)]),
    **{f"causal {path}": (partial(attention, backend=path), HEADS) for path in ("tiles", "sdpa")},
    **{f"window {path}": (partial(attention, backend=path, window=128), HEADS) for path in ("tiles", "sdpa")},
    "rms norm": (partial(rms_norm, eps=1e-6), [random(B, T, D), random(D)]),
    "loss": (loss, [random(B * T, D), random(1000, D)]),
}


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_several_threads_compute_what_one_does(name: str, dtype: torch.dtype, autocast: bool) -> None:
    op, inputs = OPS[name]
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        leaves = [x.to(dtype if x.ndim > 2 else torch.float32).requires_grad_() for x in inputs]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = op(*leaves)
            # Inside, as activation checkpointing's backward pass is.
            found.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    rounds_to_bf16 = autocast or dtype == torch.bfloat16
    for one, two in zip(*found, strict=True):
        assert one.dtype == two.dtype
        unit = 2**-8 if one.dtype == torch.bfloat16 or (rounds_to_bf16 and name != "short convolution") else 1e-5
        assert torch.linalg.norm((one - two).double()) <= unit * torch.linalg.norm(one.double()), name


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_the_convolution_adds_up_in_fp32_whatever_the_context(threads: int, autocast: bool) -> None:
    x, weight = (t.requires_grad_() for t in (random(1, 2048, D), random(D, 4)))
    torch.set_num_threads(threads)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = short_conv(x, weight)
        found = [y, *torch.autograd.grad(y, [x, weight], torch.ones_like(y))]
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = short_conv(*wide, backend="reference")
    for mine, its in zip(found, [expected, *torch.autograd.grad(expected.sum(), wide)], strict=True):
        assert torch.linalg.norm(mine - its) <= 1e-6 * torch.linalg.norm(its)
