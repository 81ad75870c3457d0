"""Causal attention by documents, attention to a cache, and the choice of a backend."""

from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from swamla.errors import ConfigError, MissingBackendError, UsageError
from swamla.ops import cached_attention, causal_attention, resolve_backend
from swamla.ops.attention.cpu import tiled_attention
from swamla.ops.attention.reference import CAUSAL, allowed_mask
from swamla.ops.layout import Layout

from .attention_checks import (
    assert_close_in_bf16,
    assert_equals_reference,
    documents,
    random_inputs,
    random_layout,
    with_gradients,
)

LAYOUTS = {
    "whole rows": documents([70], [70]),
    "a tile and one more": documents([257]),
    "one token": documents([1], [1]),
    "documents of one token": documents([1, 1, 1, 40]),
    "equal neighbours": documents([20, 20, 20], [20, 20, 20]),
    "unequal documents": documents([5, 60, 1, 64], [100, 2, 28, 0]),
}


def tiled(q, k, v, seq, *, backend="torch"):
    """The tiled path whatever the dtype, which "torch" keeps for bf16 and for unequal widths."""
    if backend == "reference":
        return causal_attention(q, k, v, seq, backend="reference")
    return tiled_attention(q, k, v, CAUSAL, scale=q.shape[-1] ** -0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seq", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_causal_attention_equals_the_reference(seq, dtype):
    assert_equals_reference(causal_attention, random_inputs(seq, dtype=dtype), seq)


@pytest.mark.parametrize("seq", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_values_may_be_narrower_than_keys_and_heads_may_share_keys(seq):
    assert_equals_reference(causal_attention, random_inputs(seq, heads=4, groups=2, key=12, value=8), seq)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_key_heads_serve_neighbouring_query_heads(groups):
    seq = documents([30, 10])
    inputs = random_inputs(seq, heads=4, groups=groups)
    assert_equals_reference(causal_attention, inputs, seq)
    q, k, v = inputs
    repeated = causal_attention(q, k.repeat_interleave(4 // groups, 2), v.repeat_interleave(4 // groups, 2), seq)
    torch.testing.assert_close(causal_attention(q, k, v, seq), repeated, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("length", [1, 255, 256, 257, 600])
def test_tiles_of_every_length_equal_the_reference(length):
    seq = documents([length])
    assert_equals_reference(tiled, random_inputs(seq, heads=4, groups=2, value=6), seq)


def test_more_heads_than_one_batch_of_tiles_holds_equal_the_reference(monkeypatch):
    monkeypatch.setattr("swamla.ops.attention.cpu.SCORES", 100_000)
    seq = documents([270], [270])
    assert_equals_reference(tiled, random_inputs(seq, heads=6, groups=3), seq)


@pytest.mark.parametrize("seed", range(6))
def test_random_layouts_equal_the_reference(seed):
    seq = random_layout(seed)
    assert_equals_reference(causal_attention, random_inputs(seq, heads=4, groups=2, value=6), seq)


@pytest.mark.parametrize(("key", "value"), [(64, 64), (48, 32)])
def test_bf16_is_within_a_hundredth_of_the_fp32_reference(key, value):
    seq = documents([300, 1, 99], [400])
    inputs = random_inputs(seq, heads=4, groups=2, key=key, value=value, dtype=torch.bfloat16)
    assert_close_in_bf16(causal_attention, inputs, seq)


def test_the_reference_is_sdpa_under_the_explicit_mask():
    seq = documents([5, 60, 15], [79, 1])
    q, k, v = random_inputs(seq, dtype=torch.float64)
    allowed = torch.zeros(2, 80, 80, dtype=torch.bool)
    for row, lengths in enumerate([[5, 60, 15], [79, 1]]):
        blocks = [torch.ones(n, n, dtype=torch.bool).tril() for n in lengths]
        allowed[row] = torch.block_diag(*blocks).bool()
    expected = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=allowed[:, None])
    torch.testing.assert_close(causal_attention(q, k, v, seq, backend="reference"), expected.transpose(1, 2))


def test_strided_views_of_a_fused_projection_are_taken_as_they_are():
    seq = documents([40, 30], [70])
    torch.manual_seed(0)
    fused = torch.randn(2, 70, 3, 2, 8, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        got = causal_attention(*fused.to(dtype).unbind(2), seq)
        expected = causal_attention(*(x.contiguous() for x in fused.to(dtype).unbind(2)), seq)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "tiles", "sdpa"])
@pytest.mark.parametrize("length", [63, 64, 65, 255, 256, 257])
def test_a_document_does_not_see_the_one_before_it(backend, length):
    seq = documents([length, 300 - length])
    q, k, v = random_inputs(seq)
    before = causal_attention(q, k, v, seq, backend=backend)
    with torch.no_grad():
        for x in (q, k, v):
            x[:, :length] = 100 * torch.randn_like(x[:, :length])
    after = causal_attention(q, k, v, seq, backend=backend)
    assert not torch.equal(before[:, :length], after[:, :length])
    assert torch.equal(before[:, length:], after[:, length:])


def test_an_id_that_comes_back_is_another_document():
    seq = Layout.from_documents(torch.tensor([[0] * 5 + [1] * 5 + [0] * 5]))
    assert torch.equal(allowed_mask(seq), allowed_mask(documents([5, 5, 5])))
    assert_equals_reference(causal_attention, random_inputs(seq), seq)


def test_padding_gives_finite_outputs_and_gradients():
    seq = Layout.from_documents(torch.tensor([[0] * 5 + [-1] * 5, [-1] * 10]))
    for backend in ("reference", "tiles", "sdpa"):
        for tensor in with_gradients(partial(causal_attention, backend=backend), random_inputs(seq, value=4), seq):
            assert tensor.isfinite().all()


def test_scale_replaces_the_default():
    seq = documents([300])
    for value in (8, 4):
        inputs = random_inputs(seq, value=value)
        assert_equals_reference(partial(causal_attention, scale=0.1), inputs, seq)
        assert not torch.allclose(causal_attention(*inputs, seq, scale=0.1), causal_attention(*inputs, seq))


@pytest.mark.parametrize("backend", ["reference", "tiles", "sdpa"])
def test_autocast_decides_the_dtype_of_fp32_inputs_and_leaves_double(backend):
    seq = documents([20])
    for given, expected in ((torch.float32, torch.bfloat16), (torch.float64, torch.float64)):
        inputs = random_inputs(seq, dtype=given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = causal_attention(*inputs, seq, backend=backend)
        assert output.dtype == expected
        output.sum().backward()
        assert all(x.grad is not None and x.grad.dtype == given for x in inputs)


def test_no_tokens_give_no_outputs():
    seq = Layout.one_document_per_row(2, 0)
    assert causal_attention(*random_inputs(seq, value=4), seq).shape == (2, 0, 2, 4)


# --- attention to a cache


@pytest.mark.parametrize("value", [8, 6])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_cached_attention_over_everything_before_equals_causal_attention(groups, value):
    seq = documents([20, 10], [30])
    q, k, v = random_inputs(seq, heads=4, groups=groups, value=value)
    allowed = allowed_mask(seq)
    expected = causal_attention(q, k, v, seq, backend="reference")
    torch.testing.assert_close(cached_attention(q, k, v, allowed), expected, atol=1e-5, rtol=1e-5)
    last = cached_attention(q[:, -3:], k, v, allowed[:, -3:])
    torch.testing.assert_close(last, expected[:, -3:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [8, 6])
def test_a_query_that_may_see_nothing_gives_zeros_and_finite_gradients(value):
    seq = documents([6], [6])
    inputs = random_inputs(seq, value=value)
    allowed = allowed_mask(seq)
    allowed[0, 2] = False
    output = cached_attention(*inputs, allowed)
    assert (output[0, 2] == 0).all()
    assert (output[0, 1] != 0).all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sum(), inputs))


# --- choices and refusals


def test_auto_is_torch_on_the_cpu_and_cudnn_on_cuda():
    assert resolve_backend("auto", "cpu") == "torch"
    assert resolve_backend("auto", "cuda") == "cudnn"
    assert resolve_backend("reference", "cuda") == "reference"


def test_flex_on_the_cpu_is_refused_with_the_way_out():
    seq = documents([3])
    with pytest.raises(MissingBackendError, match=r'"flex" needs a CUDA device.*use "torch"'):
        causal_attention(*random_inputs(seq), seq, backend="flex")


def test_an_unknown_backend_is_refused_with_the_names_there_are():
    with pytest.raises(UsageError, match=r"'fast'.*'auto', 'reference', 'torch', 'tiles', 'sdpa', 'flex'"):
        resolve_backend("fast", "cpu")


def test_shapes_that_do_not_fit_are_refused_by_name():
    seq = documents([4])
    q, k, v = random_inputs(seq, heads=3, groups=2)
    with pytest.raises(ConfigError, match="key heads = 2: must divide the 3 query heads"):
        causal_attention(q, k, v, seq)
    q, k, v = random_inputs(seq)
    with pytest.raises(ConfigError, match=r"must begin with the layout's \(1, 5\)"):
        causal_attention(q, k, v, documents([5]))
    with pytest.raises(ConfigError, match=r"q\.shape = "):
        causal_attention(q[..., :4], k, v, seq)
    with pytest.raises(ConfigError, match=r"allowed_BTS.shape = \(1, 4, 3\): must be \(1, 4, 4\)"):
        cached_attention(q, k, v, torch.ones(1, 4, 3, dtype=torch.bool))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flex_equals_the_reference():
    seq = random_layout(0, time=512).to("cuda")
    inputs = [x.detach().cuda().requires_grad_() for x in random_inputs(seq, heads=4, key=64, value=64)]
    got = with_gradients(partial(causal_attention, backend="flex"), inputs, seq)
    for mine, theirs in zip(
        got, with_gradients(partial(causal_attention, backend="reference"), inputs, seq), strict=True
    ):
        assert (mine - theirs).norm() <= 1e-2 * theirs.norm()
