"""Gradients of the delta rule in bf16, against float64 and beside transformers' rule under the same autocast.

The gates' are the delicate ones: where a head forgets, they are small differences of large products.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from swamla.ops import gated_delta_rule, kimi_delta_attention, l2_normalize
from swamla.ops.layout import Layout

NAMES = ("q", "k", "v", "log alpha", "beta")
ROWS, HEADS, WIDTH = 4, 4, 16
LENGTHS = {"one document": [160], "packed": [5, 20, 7, 33, 64, 31], "packed short": [8] * 12}
RANGES = [(-1e-3, -1e-4), (-0.5, -1e-3), (-1.6, -0.5), (-3, -1.6), (-6, -3), (-12, -6), (-12, -1e-3)]

Rule = Callable[..., Tensor]


def random_inputs(time: int, low: float, high: float, *, by_channel: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (l2_normalize(torch.randn(ROWS, time, HEADS, WIDTH, generator=generator)).bfloat16() for _ in range(2))
    v = torch.randn(ROWS, time, HEADS, WIDTH, generator=generator).bfloat16()
    gates = (ROWS, time, HEADS, WIDTH) if by_channel else (ROWS, time, HEADS)
    log_alpha = low + (high - low) * torch.rand(gates, generator=generator)
    return [q, k, v, log_alpha, torch.rand(ROWS, time, HEADS, generator=generator)]


def gradients(rule: Rule, inputs: list[Tensor]) -> list[Tensor]:
    """In double, of every input, for one upstream gradient."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    o_BTHV = rule(*leaves)
    upstream = torch.randn(o_BTHV.shape, generator=torch.Generator().manual_seed(9)).bfloat16()
    return [found.double() for found in torch.autograd.grad(o_BTHV, leaves, upstream.to(o_BTHV.dtype))]


def errors(rule: Rule, inputs: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    """‖found − exact‖ / ‖exact‖ under autocast, a token and summed over time."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(rule, inputs)
    result = {}
    for name, mine, expected in zip(NAMES, found, exact, strict=True):
        result[name] = float((mine - expected).norm() / expected.norm())
        result[f"{name} over time"] = float((mine - expected).sum(1).norm() / expected.sum(1).norm())
    return result


@pytest.mark.parametrize(("low", "high"), RANGES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_gradients_in_bf16_are_as_near_to_float64_as_transformers(lengths: list[int], low: float, high: float) -> None:
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    inputs = random_inputs(sum(lengths), low, high)
    assert_as_near(gated_delta_rule, modeling.torch_chunk_gated_delta_rule, lengths, inputs)


@pytest.mark.parametrize(("low", "high"), RANGES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_those_of_channelwise_decays_are_too(lengths: list[int], low: float, high: float) -> None:
    modeling = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    inputs = random_inputs(sum(lengths), low, high, by_channel=True)
    assert_as_near(kimi_delta_attention, modeling.chunk_kimi_delta_attention, lengths, inputs)


def assert_as_near(rule: Any, transformers: Any, lengths: list[int], inputs: list[Tensor]) -> None:
    ids = [index for index, length in enumerate(lengths) for _ in range(length)]
    seq = Layout.from_documents(torch.tensor([ids] * ROWS))

    def ours(backend: str, chunk: int | None = None) -> Rule:
        return lambda *x: rule(*x, seq=seq, backend=backend, chunk=chunk)[0]

    def theirs(*x: Tensor) -> Tensor:
        alone = zip(*(part.split(lengths, dim=1) for part in x), strict=True)
        return torch.cat([transformers(*document, use_qk_l2norm_in_kernel=False)[0] for document in alone], dim=1)

    exact = gradients(ours("reference"), [x.double() for x in inputs])
    beside = errors(theirs, inputs, exact)
    for chunk in (32, 64):
        for name, error in errors(ours("torch", chunk), inputs, exact).items():
            # Both are some thousandths of rounding noise, two draws of it; a fault would be off by many times that.
            allowed = max(1.5 * beside[name], 1e-2)
            assert error <= allowed, f"{name}, chunk {chunk}: {error:.4f}, transformers {beside[name]:.4f}"
