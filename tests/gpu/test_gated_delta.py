"""The gated delta rule and its convolution on a GPU against the reference: outputs, states and gradients."""

import pytest
import torch
import torch.nn.functional as F

from swamla.ops import gated_delta_rule, short_conv
from swamla.ops.gated_delta import resolve_backend
from swamla.ops.gated_delta.cuda import obstacle
from swamla.ops.layout import Layout
from tests.gpu.checks import assert_parity, no_waiting, randn

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
TOLERANCE = {torch.bfloat16: 4e-2, torch.float16: 2e-2, torch.float32: 1e-3}
ROWS = {
    "whole rows": [[(0, 200)], [(0, 200)]],
    "documents": [[(0, 5), (1, 130), (2, 65)], [(0, 199), (1, 1)]],
    "on chunks": [[(0, 64), (1, 128), (2, 8)], [(0, 128), (1, 72)]],
    "padding": [[(-1, 4), (0, 126), (-1, 10), (2, 60)], [(0, 150), (-1, 50)]],
}
each_layout = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())


def layout(rows):
    """Rows of (document id, length)."""
    return Layout.from_documents(torch.tensor([[i for i, n in row for _ in range(n)] for row in rows])).to("cuda")


def inputs(seq, dtype, heads, key, value):
    q, k = (F.normalize(randn(*seq.shape, heads, key, seed=i), dim=-1).to(dtype) for i in range(2))
    v = randn(*seq.shape, heads, 2 * value, dtype=dtype, seed=2)
    gates = [-0.3 * randn(*seq.shape, heads, seed=3).abs(), randn(*seq.shape, heads, seed=4).sigmoid()]
    return [q, k, v, *gates, randn(seq.shape[0], heads, key, value, seed=5)]


def rule(seq, backend):
    def compute(q, k, wide, log_alpha, beta, state):
        v = wide.chunk(2, dim=-1)[0]  # a mixer's values are part of a wider tensor, too
        return gated_delta_rule(q, k, v, log_alpha, beta, seq=seq, initial_state_BHKV=state, backend=backend)

    return compute


@each_layout
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("key", "value"), [(64, 64), (128, 128), (128, 256), (32, 48)])
def test_chunks_are_the_reference(rows, dtype, key, value):
    seq = layout(rows)
    assert_parity(rule(seq, "torch"), rule(seq, "reference"), inputs(seq, dtype, 2, key, value), TOLERANCE[dtype])


@each_layout
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("key", "value"), [(64, 64), (128, 128), (128, 256)])
def test_flash_linear_attention_is_the_reference_where_it_is_chosen(rows, dtype, key, value):
    reason = obstacle(CUDA, 2, key, value)
    if reason is not None:
        pytest.skip(f"fla {reason}")
    seq = layout(rows)
    assert_parity(rule(seq, "fla"), rule(seq, "reference"), inputs(seq, dtype, 2, key, value), TOLERANCE[dtype])


@each_layout
def test_the_host_does_not_wait(rows):
    seq = layout(rows)
    backend = resolve_backend("auto", CUDA, heads=2, key=128, value=128)
    leaves = [x.requires_grad_() for x in inputs(seq, torch.bfloat16, 2, 128, 128)]
    x, weight = randn(*seq.shape, 32).requires_grad_(), randn(32, 4, seed=1).requires_grad_()

    def run():
        batch = Layout(seq.document_BT, seq.position_BT, seq.runs, padded=seq.padded)  # its tables are made anew
        o, _ = rule(batch, backend)(*leaves)
        (o.sum() + short_conv(x, weight, seq=batch).sum()).backward()

    run()  # compiles
    with no_waiting():
        run()


@each_layout
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_convolution_is_the_reference(rows, dtype):
    seq = layout(rows)
    assert_parity(
        lambda x, weight: [short_conv(x, weight, seq=seq)],
        lambda x, weight: [short_conv(x, weight, seq=seq, backend="reference")],
        [randn(*seq.shape, 48, dtype=dtype), randn(48, 4, dtype=dtype, seed=1)],
    )
