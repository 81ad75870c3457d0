"""Sliding-window attention with sinks: equal to the written-out mask, isolated by document, linear in time."""

from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from swamla.errors import ConfigError
from swamla.ops import causal_attention, windowed_attention
from swamla.ops.attention.cpu import kept_keys
from swamla.ops.attention.reference import Window, allowed_mask
from swamla.ops.layout import Layout

from .attention_checks import (
    assert_close_in_bf16,
    assert_equals_reference,
    attention,
    documents,
    random_inputs,
    random_layout,
    random_logits,
    with_gradients,
    with_sink_logit,
)

WINDOWS = [(1, 0), (1, 3), (2, 0), (7, 3), (3, 7), (63, 4), (64, 4), (65, 64), (128, 0), (129, 1), (100, 300), (500, 4)]


@pytest.mark.parametrize(("window", "sinks"), WINDOWS)
def test_every_window_and_number_of_sinks_equals_the_reference(window, sinks):
    seq = documents([330, 20], [64, 150, 136])
    assert_equals_reference(attention(window, sinks), random_inputs(seq, heads=4, groups=2, value=6), seq)


@pytest.mark.parametrize(("window", "sinks"), [(7, 3), (128, 70)])
def test_in_double_it_equals_the_reference_to_eleven_digits(window, sinks):
    seq = documents([330, 20], [64, 150, 136])
    assert_equals_reference(attention(window, sinks), random_inputs(seq, dtype=torch.float64), seq)


SINK_LOGITS = [(None, 0), (1, 0), (7, 0), (64, 0), (65, 64), (128, 0), (500, 0), (7, 3)]
with_layouts = pytest.mark.parametrize(
    "rows", [([330, 20], [64, 150, 136]), ([350], [350]), ([1, 349], [2, 348])], ids=str
)


@with_layouts
@pytest.mark.parametrize(("window", "sinks"), SINK_LOGITS)
def test_a_learned_sink_logit_equals_the_reference_whatever_the_window_and_the_documents(window, sinks, rows):
    seq = documents(*rows)
    inputs = [*random_inputs(seq, heads=4, groups=2, value=6), random_logits(4)]
    assert_equals_reference(with_sink_logit(attention(window, sinks)), inputs, seq)


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("scores", [1, 60_000])
def test_however_tiles_with_a_sink_logit_are_batched_and_kept_the_result_is_that_of_the_reference(
    window, scores, monkeypatch
):
    monkeypatch.setattr("swamla.ops.attention.cpu.SCORES", scores)
    seq = documents([700], [700])
    inputs = [*random_inputs(seq, heads=4, groups=2), random_logits(4)]
    attend = with_sink_logit(attention(window))
    kept = with_gradients(partial(attend, backend="tiles"), inputs, seq)
    monkeypatch.setattr("swamla.ops.attention.cpu.KEPT", 0)
    again = with_gradients(partial(attend, backend="tiles"), inputs, seq)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    assert_equals_reference(attend, inputs, seq)


def test_a_sink_logit_in_double_and_in_bf16_is_near_the_reference():
    seq = documents([330, 20], [64, 150, 136])
    attend = with_sink_logit(attention(70))
    exact = [*random_inputs(seq, dtype=torch.float64), random_logits(2, torch.float64)]
    assert_equals_reference(attend, exact, seq)
    rounded = [*random_inputs(seq, heads=4, groups=2, key=32, value=32, dtype=torch.bfloat16)]
    for backend in ("tiles", "sdpa"):
        inputs = [*rounded, random_logits(4).detach().bfloat16().requires_grad_()]
        assert_close_in_bf16(partial(attend, backend=backend), inputs, seq)


@pytest.mark.parametrize("backend", ["reference", "tiles", "sdpa"])
def test_a_sink_logit_takes_the_share_that_its_score_has_of_the_softmax(backend):
    """Without keys that differ, n + exp(logit) equal scores: the output is n / (n + exp(logit)) of the values' mean."""
    seq, logit = documents([40]), torch.tensor([-100.0, 0.0, 2.0, 100.0])
    q, k, v = (torch.ones(1, 40, heads, 8) for heads in (4, 2, 2))
    o = windowed_attention(q, k * 0, v, seq, window=16, sinks=0, sink_logit_H=logit, backend=backend)
    count = torch.arange(1.0, 41).clamp(max=16)[:, None]
    torch.testing.assert_close(o[0, ..., 0], count / (count + logit.exp()))


@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 65, 68, 69, 96, 97, 127, 128, 129, 132, 133, 192, 193, 260])
def test_documents_that_end_anywhere_near_a_window_or_tile_equal_the_reference(length):
    seq = documents([length, 10])
    assert_equals_reference(attention(32, 4), random_inputs(seq), seq)
    assert_equals_reference(attention(64, 5), random_inputs(seq), seq)


@pytest.mark.parametrize("seed", range(8))
def test_random_layouts_windows_and_sinks_equal_the_reference(seed):
    seq = random_layout(seed)
    generator = torch.Generator().manual_seed(seed)
    window, sinks = (int(torch.randint(low, 200, (1,), generator=generator)) for low in (1, 0))
    assert_equals_reference(attention(window, sinks), random_inputs(seq, heads=4, groups=2), seq)


@pytest.mark.parametrize("scores", [1, 60_000, 200_000])
def test_however_tiles_are_batched_the_result_is_that_of_the_reference(scores, monkeypatch):
    monkeypatch.setattr("swamla.ops.attention.cpu.SCORES", scores)
    seq = documents([700], [700])
    assert_equals_reference(attention(70, 4), random_inputs(seq, heads=4, groups=2), seq)


def test_what_is_kept_is_known_at_once_for_any_length():
    assert kept_keys(10**12, 10**12, 0) == 0.0
    assert kept_keys(10**12, 256, 4) == pytest.approx(kept_keys(30_000, 256, 4), rel=1e-2)
    assert 0 < kept_keys(1024, 1024, 0) < 1024


@pytest.mark.parametrize("window", [70, 700], ids=["windowed", "causal"])
def test_weights_computed_again_give_the_gradients_of_kept_ones_to_the_bit(window, monkeypatch):
    seq = documents([700], [700])
    kept = with_gradients(attention(window, 4), random_inputs(seq, heads=4, groups=2), seq)
    monkeypatch.setattr("swamla.ops.attention.cpu.KEPT", 0)
    again = with_gradients(attention(window, 4), random_inputs(seq, heads=4, groups=2), seq)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    assert_equals_reference(attention(window, 4), random_inputs(seq, heads=4, groups=2), seq)


@pytest.mark.parametrize("key", [64, 16])
def test_bf16_is_within_a_hundredth_of_the_fp32_reference(key):
    seq = documents([700, 1, 99], [800])
    inputs = random_inputs(seq, heads=4, groups=2, key=key, value=32, dtype=torch.bfloat16)
    assert_close_in_bf16(attention(128, 4), inputs, seq)


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (16, 4), (16, 40), (200, 4)])
def test_the_reference_is_sdpa_under_the_mask_of_the_definition(window, sinks):
    lengths = [60, 1, 39]
    seq = documents(lengths)
    position = [p for n in lengths for p in range(n)]
    document = [d for d, n in enumerate(lengths) for _ in range(n)]
    allowed = torch.tensor(
        [
            [document[t] == document[s] and s <= t and (t - s < window or position[s] < sinks) for s in range(100)]
            for t in range(100)
        ]
    )
    assert torch.equal(allowed_mask(seq, Window(window, sinks))[0], allowed)
    q, k, v = random_inputs(seq, dtype=torch.float64)
    expected = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=allowed).transpose(1, 2)
    for backend in ("reference", "tiles", "sdpa"):
        got = windowed_attention(q, k, v, seq, window=window, sinks=sinks, backend=backend)
        torch.testing.assert_close(got, expected)


def test_a_window_over_the_whole_document_is_causal_attention():
    seq = documents([150, 50], [200])
    inputs = random_inputs(seq)
    for window, sinks in ((150, 0), (200, 4), (10_000, 300), (3, 200)):
        expected = causal_attention(*inputs, seq)
        got = windowed_attention(*inputs, seq, window=window, sinks=sinks)
        same = slice(0, 150) if window == 150 else slice(None)
        torch.testing.assert_close(got[:, same], expected[:, same], atol=1e-5, rtol=1e-5)


def test_a_window_of_one_without_sinks_returns_the_values():
    seq = documents([90])
    q, k, v = random_inputs(seq)
    torch.testing.assert_close(windowed_attention(q, k, v, seq, window=1, sinks=0), v, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "tiles", "sdpa"])
@pytest.mark.parametrize("length", [31, 32, 33, 63, 64, 65, 127, 128, 129, 200])
def test_a_document_does_not_see_the_one_before_it(backend, length):
    seq = documents([length, 300 - length])
    q, k, v = random_inputs(seq)
    attend = partial(attention(32, 4), backend=backend)
    before = attend(q, k, v, seq)
    with torch.no_grad():
        for x in (q, k, v):
            x[:, :length] = 100 * torch.randn_like(x[:, :length])
    after = attend(q, k, v, seq)
    assert not torch.equal(before[:, :length], after[:, :length])
    assert torch.equal(before[:, length:], after[:, length:])


def test_a_token_reaches_its_window_and_its_sinks_and_nothing_else():
    seq = documents([300])
    q, k, v = random_inputs(seq)
    output = windowed_attention(q, k, v, seq, window=32, sinks=4)
    (grad_v,) = torch.autograd.grad(output[0, 250].sum(), v)
    reached = grad_v[0, :, 0, 0].nonzero().flatten().tolist()
    assert reached == [0, 1, 2, 3, *range(250 - 31, 251)]


@pytest.mark.parametrize("backend", ["reference", "tiles", "sdpa"])
def test_padding_gives_finite_outputs_and_gradients(backend):
    seq = Layout.from_documents(torch.tensor([[0] * 150 + [-1] * 150, [-1] * 300]))
    for tensor in with_gradients(partial(attention(16, 4), backend=backend), random_inputs(seq), seq):
        assert tensor.isfinite().all()


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any op returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def cost(time: int) -> tuple[int, int]:
    """Floating-point operations, forward and backward, and elements of the largest tensor on the way."""
    seq = Layout.one_document_per_row(1, time)
    inputs = random_inputs(seq)
    with FlopCounterMode(display=False) as flops, LargestTensor() as largest:
        windowed_attention(*inputs, seq, window=128, sinks=4).sum().backward()
    return flops.get_total_flops(), largest.elements


def test_work_and_memory_are_linear_in_time():
    (work_1, memory_1), (work_2, memory_2), (work_4, memory_4) = cost(512), cost(1024), cost(2048)
    # Each further token costs the same, to the operation and to the element.
    assert work_4 - work_2 == 2 * (work_2 - work_1)
    assert memory_4 - memory_2 == 2 * (memory_2 - memory_1)
    # 3 buffers of 2 heads × (window + tile + sinks) scores a token, against 2 × 2048 for a full score matrix
    assert memory_4 <= 3 * 2 * 2048 * (128 + 64 + 4) < 2 * 2048 * 2048


def test_windows_below_one_and_negative_sinks_are_refused():
    seq = documents([3])
    with pytest.raises(ConfigError, match="window = 0: must be >= 1"):
        windowed_attention(*random_inputs(seq), seq, window=0, sinks=0)
    with pytest.raises(ConfigError, match="sinks = -1: must be >= 0"):
        windowed_attention(*random_inputs(seq), seq, window=1, sinks=-1)


def test_sink_logits_of_another_number_of_heads_are_refused():
    seq = documents([3])
    with pytest.raises(ConfigError, match=r"sink_logit.shape = \(3,\): must be \(2,\): one for each query head"):
        windowed_attention(*random_inputs(seq), seq, window=1, sinks=0, sink_logit_H=torch.zeros(3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flex_equals_the_reference():
    seq = random_layout(0, time=512).to("cuda")
    inputs = [x.detach().cuda().requires_grad_() for x in random_inputs(seq, heads=4, key=64, value=64)]
    expected = with_gradients(partial(attention(100, 4), backend="reference"), inputs, seq)
    for mine, theirs in zip(
        with_gradients(partial(attention(100, 4), backend="flex"), inputs, seq), expected, strict=True
    ):
        assert (mine - theirs).norm() <= 1e-2 * theirs.norm()


@pytest.mark.parametrize("backend", ["reference", "torch", "tiles", "sdpa"])
def test_what_inference_made_serves_training_of_the_same_shapes(backend: str) -> None:
    """Masks depend on shapes alone and are kept: one made in inference mode could not be saved for a backward pass."""
    q, k, v = (torch.randn(1, 77, 2, 8) for _ in range(3))
    seq = Layout.one_document_per_row(1, 77)
    with torch.inference_mode():
        expected = windowed_attention(q, k, v, seq, window=11, sinks=3, backend=backend)
    q.requires_grad_()
    seq = Layout.one_document_per_row(1, 77)
    out = windowed_attention(q, k, v, seq, window=11, sinks=3, backend=backend)
    out.sum().backward()
    torch.testing.assert_close(out.detach(), expected)
    assert q.grad is not None
