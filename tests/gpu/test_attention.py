"""Attention on a GPU against the reference: outputs and gradients."""

import pytest
import torch

from swamla.ops import cached_attention, causal_attention, windowed_attention
from swamla.ops.attention.reference import reference_attention
from swamla.ops.layout import Layout
from tests.gpu.checks import assert_parity, no_waiting, randn
from tests.ops.attention_checks import documents, random_layout

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
WIDTHS = [(192, 128), (64, 64), (128, 128), (36, 20), (8, 8)]
PACKED = {
    "random": random_layout(0, time=600),
    "padding": random_layout(6, time=300),
    "on blocks": documents([128, 256, 128], [512]),
    "around blocks": documents([127, 129, 1, 255], [1, 511]),
    "short": documents([30, 10], [1, 39]),
}


def inputs(seq, dtype, *, heads=4, groups=4, key=64, value=64):
    shapes = [(heads, key), (groups, key), (groups, value)]
    return [randn(*seq.shape, *shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def check(attend, seq, tensors):
    """`attend` on the backend "auto" against the reference."""
    seq = seq.to("cuda")
    assert_parity(
        lambda q, k, v: [attend(q, k, v, seq)],
        lambda q, k, v: [attend(q, k, v, seq, backend="reference")],
        tensors,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("key", "value"), WIDTHS)
@pytest.mark.parametrize("time", [1, 7, 256, 1000])
def test_whole_rows_are_the_reference(dtype, key, value, time):
    seq = Layout.one_document_per_row(2, time)
    check(causal_attention, seq, inputs(seq, dtype, key=key, value=value))


@pytest.mark.parametrize(
    ("dtype", "key", "value"),
    [*((torch.bfloat16, *widths) for widths in WIDTHS), *((d, 64, 64) for d in DTYPES[1:]), (torch.float32, 192, 128)],
)
@pytest.mark.parametrize("seq", PACKED.values(), ids=PACKED.keys())
def test_packed_rows_are_the_reference(dtype, key, value, seq):
    check(causal_attention, seq, inputs(seq, dtype, key=key, value=value))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seq", [documents([500], [500]), documents([300, 200], [1, 499])], ids=["whole", "packed"])
def test_grouped_heads_are_the_reference(dtype, seq):
    check(causal_attention, seq, inputs(seq, dtype, groups=2))
    check(windowed(64, 4), seq, inputs(seq, dtype, groups=1))


def windowed(window, sinks):
    return lambda q, k, v, seq, **options: windowed_attention(q, k, v, seq, window=window, sinks=sinks, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("window", "sinks"), [(256, 4), (64, 0), (1, 1), (200, 130)])
@pytest.mark.parametrize("seq", [documents([700], [700]), *PACKED.values()], ids=["whole", *PACKED])
def test_windowed_attention_is_the_reference(dtype, window, sinks, seq):
    check(windowed(window, sinks), seq, inputs(seq, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("key", "value"), WIDTHS)
@pytest.mark.parametrize("groups", [4, 2])
def test_new_tokens_behind_cached_ones_are_the_reference(dtype, key, value, groups):
    q, k, v = (
        randn(3, *shape, dtype=dtype, seed=i)
        for i, shape in enumerate([(100, 4, key), (700, groups, key), (700, groups, value)])
    )
    allowed = torch.ones(3, 100, 700, dtype=torch.bool, device="cuda").tril(600)
    assert_parity(lambda *x: [cached_attention(*x, None)], lambda *x: [reference_attention(*x, allowed)], [q, k, v])


@pytest.mark.parametrize("seq", [documents([512], [512]), documents([500, 12], [1, 511])], ids=["whole", "packed"])
def test_the_host_does_not_wait(seq):
    q, k, v = (x.requires_grad_() for x in inputs(seq, torch.bfloat16))
    seq = seq.to("cuda")

    def run():
        batch = Layout(seq.document_BT, seq.position_BT, seq.runs)  # its masks are made anew
        causal_attention(q, k, v, batch).sum().backward()
        windowed(256, 4)(q, k, v, batch).sum().backward()

    run()  # compiles
    with no_waiting():
        run()
