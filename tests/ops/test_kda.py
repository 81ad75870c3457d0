"""Kimi Delta Attention: chunks against the recurrence, and both against the implementation in transformers."""

import pytest
import torch
from torch import Tensor

from swamla.errors import UsageError
from swamla.ops import gated_delta_rule, kimi_delta_attention, kimi_delta_step, l2_normalize
from swamla.ops.gated_delta import cpu
from swamla.ops.kda import chunks
from swamla.ops.layout import Layout

from .test_gated_delta import PACKED, Inputs, assert_all_close, documents, with_gradients


def inputs(
    batch: int, time: int, heads: int, key: int, value: int, dtype: torch.dtype, seed: int = 0, least: float = -0.3
) -> Inputs:
    """q, k, v, log alpha in [least, 0], beta and the initial state, as a trained layer would make them."""
    torch.manual_seed(seed)
    q_BTHK, k_BTHK = (l2_normalize(torch.randn(batch, time, heads, key, dtype=dtype)) for _ in range(2))
    v_BTHV = torch.randn(batch, time, heads, value, dtype=dtype)
    log_alpha_BTHK = least * torch.rand(batch, time, heads, key, dtype=dtype)
    beta_BTH = torch.rand(batch, time, heads, dtype=dtype)
    state_BHKV = torch.randn(batch, heads, key, value, dtype=dtype)
    return tuple(x.requires_grad_() for x in (q_BTHK, k_BTHK, v_BTHV, log_alpha_BTHK, beta_BTH, state_BHKV))  # type: ignore[return-value]


def run(x: Inputs, backend: str, seq: Layout | None = None, chunk: int = 16) -> tuple[Tensor, Tensor]:
    return kimi_delta_attention(*x[:5], seq=seq, initial_state_BHKV=x[5], backend=backend, chunk=chunk)


@pytest.fixture(autouse=True, params=[1, 4096], ids=["many segments", "one segment"])
def _segments(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CPU_ROWS", request.param)


@pytest.mark.parametrize(
    ("time", "chunk", "key", "value"),
    [(1, 64, 8, 8), (7, 64, 8, 5), (64, 16, 5, 8), (50, 16, 8, 8), (65, 64, 16, 16), (9, 1, 4, 4), (9, 2, 4, 4)],
)
@pytest.mark.parametrize(("dtype", "output", "gradient"), [(torch.float64, 1e-12, 1e-11), (torch.float32, 1e-5, 1e-4)])
def test_chunks_equal_the_recurrence_with_gradients(
    time: int, chunk: int, key: int, value: int, dtype: torch.dtype, output: float, gradient: float
) -> None:
    x = inputs(2, time, 3, key, value, dtype)
    got, expected = (with_gradients(run(x, backend, chunk=chunk), x) for backend in ("torch", "reference"))
    assert_all_close(got, expected, output, gradient)


@pytest.mark.parametrize("rows", PACKED.values(), ids=PACKED.keys())
def test_chunks_equal_the_recurrence_on_packed_documents(rows: tuple[list[tuple[int, int]], ...]) -> None:
    x = inputs(2, 50, 2, 8, 4, torch.float64)
    seq = documents(*rows)
    got, expected = (with_gradients(run(x, backend, seq), x) for backend in ("torch", "reference"))
    assert_all_close(got, expected, 1e-12, 1e-11)


@pytest.mark.parametrize("packed", [False, True])
def test_the_hand_written_backward_passes_gradcheck(packed: bool) -> None:
    x = inputs(2, 7, 1, 3, 2, torch.float64)
    seq = documents([(0, 2), (1, 4), (-1, 1)], [(0, 3), (1, 1), (2, 3)]) if packed else None

    def outputs(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return kimi_delta_attention(*leaves[:5], seq=seq, initial_state_BHKV=leaves[5], chunk=4)

    assert torch.autograd.gradcheck(outputs, x)


@pytest.mark.parametrize("name", ["chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_equals_transformers_with_gradients(name: str, backend: str) -> None:
    modeling = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    x = inputs(2, 70, 2, 16, 8, torch.float32)
    theirs = getattr(modeling, name)(*x[:5], initial_state=x[5], output_final_state=True)
    assert_all_close(with_gradients(run(x, backend), x), with_gradients(theirs, x), 1e-5, 1e-4)


def test_channels_that_decay_alike_are_the_gated_delta_rule() -> None:
    x = inputs(2, 50, 2, 8, 6, torch.float64)
    alike: Inputs = (*x[:3], x[3][..., 0].detach().requires_grad_(), *x[4:])  # type: ignore[assignment]
    expected = with_gradients(gated_delta_rule(*alike[:5], initial_state_BHKV=alike[5], backend="reference"), alike)
    spread: Inputs = (*x[:3], alike[3][..., None].expand_as(x[3]), *x[4:])  # type: ignore[assignment]
    assert_all_close(with_gradients(run(spread, "torch"), alike), expected, 1e-12, 1e-11)


def beside_double(x: Inputs, chunk: int) -> list[tuple[Tensor, Tensor]]:
    """Outputs and gradients of chunks in x's dtype, each with the recurrence's in fp64."""
    generator = torch.Generator().manual_seed(1)
    exact: Inputs = tuple(a.detach().double().requires_grad_() for a in x)  # type: ignore[assignment]
    outputs = run(x, "torch", chunk=chunk), run(exact, "reference")
    upstream = [torch.randn(a.shape, generator=generator) for a in outputs[0]]
    mine = torch.autograd.grad(outputs[0], x, upstream)
    theirs = torch.autograd.grad(outputs[1], exact, [a.double() for a in upstream])
    return list(zip((*outputs[0], *mine), (*outputs[1], *theirs), strict=True))


@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("least", [-5.0, -20.0, -1e4])
@pytest.mark.parametrize("every", [1, 3])
def test_strong_decays_neither_overflow_nor_lose_a_digit(least: float, every: int, chunk: int) -> None:
    """Sums of log alpha in a chunk whose e^-G, the second factor of the plain form, is infinite in fp32."""
    x = inputs(1, 130, 2, 8, 8, torch.float32, least=-0.1)
    with torch.no_grad():
        x[3][:, ::every, :, ::2] = least  # beside channels that hardly decay
        assert (-x[3][:, :64].sum(1)).exp().isinf().any()
    for mine, exact in beside_double(x, chunk):
        assert mine.isfinite().all()
        assert (mine - exact).norm() <= 1e-6 * exact.norm()


def test_gradients_of_channels_that_forget_at_once_are_right_to_the_last_digits_too() -> None:
    """They are tiny beside those of channels that remember: there can be no difference of larger sums in them."""
    x = inputs(1, 64, 1, 8, 8, torch.float32, least=-0.1)
    with torch.no_grad():
        x[3][..., ::2] = -15.0
    mine, exact = (gradient[..., ::2] for gradient in beside_double(x, 64)[5])
    assert 0 < exact.abs().max() < 1e-5
    assert (mine - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_extreme_writes_are_finite_and_right(beta: float) -> None:
    x = inputs(1, 40, 2, 8, 8, torch.float32)
    with torch.no_grad():
        x[3][:, ::3], x[4][:, 1::2] = 0.0, beta
    got, expected = (with_gradients(run(x, backend), x) for backend in ("torch", "reference"))
    assert_all_close(got, expected, 1e-5, 1e-4)


def test_step_after_step_equals_forward() -> None:
    x = inputs(2, 20, 3, 8, 5, torch.float32)
    o_BTHV, final_BHKV = run(x, "torch", chunk=8)
    with torch.no_grad():
        state_BHKV = x[5].clone()
        for t in range(20):
            o_BHV = kimi_delta_step(*(a[:, t] for a in x[:5]), state_BHKV)
            torch.testing.assert_close(o_BHV, o_BTHV[:, t], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state_BHKV, final_BHKV, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("split", [1, 15, 16, 17, 49])
def test_two_parts_with_the_state_carried_equal_the_whole(split: int) -> None:
    x = inputs(2, 50, 2, 8, 8, torch.float64)
    o_BTHV, final_BHKV = run(x, "torch")
    first_BTHV, state_BHKV = kimi_delta_attention(*(a[:, :split] for a in x[:5]), initial_state_BHKV=x[5], chunk=16)
    seq = Layout.continuing(torch.full((2,), split), torch.ones(2, 50 - split, dtype=torch.bool))
    second_BTHV, last_BHKV = kimi_delta_attention(
        *(a[:, split:] for a in x[:5]), seq=seq, initial_state_BHKV=state_BHKV, chunk=16
    )
    torch.testing.assert_close(torch.cat([first_BTHV, second_BTHV], dim=1), o_BTHV)
    torch.testing.assert_close(last_BHKV, final_BHKV)


def test_padding_behind_a_row_leaves_its_state_as_it_was() -> None:
    x = inputs(2, 20, 2, 8, 8, torch.float64)
    valid_BT = torch.arange(20) < torch.tensor([[13], [0]])
    o_BTHV, final_BHKV = run(x, "torch", Layout.continuing(torch.tensor([5, 5]), valid_BT), chunk=8)
    short_BTHV, short_BHKV = kimi_delta_attention(*(a[:1, :13] for a in x[:5]), initial_state_BHKV=x[5][:1], chunk=8)
    torch.testing.assert_close(o_BTHV[:1, :13], short_BTHV)
    torch.testing.assert_close(final_BHKV[:1], short_BHKV)
    assert torch.equal(final_BHKV[1], x[5][1])
    assert torch.equal(o_BTHV[~valid_BT], torch.zeros_like(o_BTHV[~valid_BT]))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("start", [15, 16, 17, 24])
def test_a_document_sees_nothing_of_the_one_before_it(backend: str, start: int) -> None:
    seq = documents([(0, start), (1, 50 - start)])
    x, other = (inputs(1, 50, 2, 8, 8, torch.float32, seed) for seed in (0, 1))
    before_T = torch.arange(50) < start
    mixed = [
        torch.where(before_T.view(1, 50, *[1] * (a.ndim - 2)), b, a).detach()
        for a, b in zip(x[:5], other, strict=False)
    ]
    o_BTHV, final_BHKV = run(x, backend, seq)
    perturbed_BTHV, perturbed_BHKV = kimi_delta_attention(
        *mixed, seq=seq, initial_state_BHKV=other[5], backend=backend, chunk=16
    )
    assert torch.equal(o_BTHV[:, start:], perturbed_BTHV[:, start:])
    assert torch.equal(final_BHKV, perturbed_BHKV)
    assert not torch.equal(o_BTHV[:, :start], perturbed_BTHV[:, :start])
    d_x = torch.autograd.grad(o_BTHV[:, start:].sum() + final_BHKV.sum(), x)
    assert all(d[:, :start].abs().max() == 0 for d in d_x[:5])
    assert d_x[5].abs().max() == 0


@pytest.mark.parametrize("least", [-0.3, -5.0])
@pytest.mark.parametrize("packed", [False, True])
def test_bf16_inputs_stay_within_one_percent_of_fp32(packed: bool, least: float) -> None:
    x = inputs(2, 256, 2, 32, 32, torch.float32, least=least)
    seq = documents([(0, 100), (1, 156)], [(0, 256)]) if packed else None
    low: Inputs = tuple(a.detach().bfloat16().requires_grad_() if i < 3 else a for i, a in enumerate(x))  # type: ignore[assignment]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o_BTHV, final_BHKV = run(low, "torch", seq, chunk=64)
        assert (o_BTHV.dtype, final_BHKV.dtype) == (torch.bfloat16, torch.float32)
        got = with_gradients((o_BTHV.float(), final_BHKV), low)
    exact: Inputs = tuple(a.detach().float().requires_grad_() for a in low)  # type: ignore[assignment]
    expected = with_gradients(run(exact, "reference", seq), exact)
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine.float() - theirs).norm() <= 1e-2 * theirs.norm()


def test_only_the_final_state_may_be_used() -> None:
    x = inputs(1, 20, 1, 4, 4, torch.float64)
    got, expected = (torch.autograd.grad(run(x, b)[1].square().sum(), x[1:]) for b in ("torch", "reference"))
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_no_tensor_of_a_chunk_has_a_score_for_each_channel() -> None:
    """Of C tokens with K channels: the plain form multiplies C·C·K decays, the halves of blocks C·K a level."""
    x = [a.detach()[:, :64].transpose(1, 2) for a in inputs(1, 64, 2, 32, 8, torch.float32)[:4]]
    levels, *_ = chunks._decays(x[3])
    assert len(levels) == 6
    assert {factor.numel() for level in levels for factor in level} == {2 * 32 * 32}


@pytest.mark.parametrize("chunk", [-8, 24, 33])
def test_a_chunk_that_cannot_be_halved_is_refused(chunk: int) -> None:
    with pytest.raises(UsageError, match=f"chunk = {chunk}: must be a power of two, e.g. 32"):
        run(inputs(1, 40, 1, 2, 2, torch.float32), "torch", chunk=chunk)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(UsageError, match="'fla': Kimi Delta Attention has 'auto', 'reference', 'torch'"):
        run(inputs(1, 4, 1, 2, 2, torch.float32), "fla")
