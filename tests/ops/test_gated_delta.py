"""The gated delta rule: chunks against the recurrence, and both against the implementation in transformers."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from swamla.errors import UsageError
from swamla.ops import l2_normalize
from swamla.ops.gated_delta import cpu, gated_delta_rule, gated_delta_step
from swamla.ops.layout import Layout

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(batch: int, time: int, heads: int, key: int, value: int, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """q, k, v, log alpha, beta and the initial state, as a trained layer would make them."""
    torch.manual_seed(seed)
    q_BTHK, k_BTHK = (l2_normalize(torch.randn(batch, time, heads, key, dtype=dtype)) for _ in range(2))
    v_BTHV = torch.randn(batch, time, heads, value, dtype=dtype)
    log_alpha_BTH = -0.3 * torch.rand(batch, time, heads, dtype=dtype)
    beta_BTH = torch.rand(batch, time, heads, dtype=dtype)
    state_BHKV = torch.randn(batch, heads, key, value, dtype=dtype)
    return tuple(x.requires_grad_() for x in (q_BTHK, k_BTHK, v_BTHV, log_alpha_BTH, beta_BTH, state_BHKV))  # type: ignore[return-value]


def run(x: Inputs, backend: str, seq: Layout | None = None, chunk: int = 16) -> tuple[Tensor, Tensor]:
    return gated_delta_rule(*x[:5], seq=seq, initial_state_BHKV=x[5], backend=backend, chunk=chunk)


def with_gradients(outputs: tuple[Tensor, Tensor], leaves: Inputs) -> list[Tensor]:
    """The outputs and the gradients of a random combination of both."""
    generator = torch.Generator().manual_seed(1)
    total = sum((x * torch.randn(x.shape, dtype=x.dtype, generator=generator)).sum() for x in outputs)
    assert isinstance(total, Tensor)
    return [*outputs, *torch.autograd.grad(total, leaves)]


def assert_all_close(got: list[Tensor], expected: list[Tensor], output: float, gradient: float) -> None:
    for i, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        tolerance = output if i < 2 else gradient
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)


def documents(*rows: list[tuple[int, int]]) -> Layout:
    """Rows of (document id, length)."""
    return Layout.from_documents(torch.tensor([[i for i, n in row for _ in range(n)] for row in rows]))


@pytest.fixture(autouse=True, params=[1, 4096], ids=["many segments", "one segment"])
def _segments(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CPU_ROWS", request.param)


PACKED = {
    "inside chunks": ([(0, 5), (1, 30), (2, 15)], [(0, 40), (1, 10)]),
    "on chunk edges": ([(0, 16), (1, 32), (2, 2)], [(0, 15), (1, 2), (2, 33)]),
    "many in a chunk": ([(i, 1) for i in range(10)] + [(10, 40)], [(i, 5) for i in range(10)]),
    "padding around": ([(-1, 4), (0, 13), (-1, 3), (2, 30)], [(0, 20), (-1, 30)]),
    "padding only": ([(-1, 50)], [(-1, 50)]),
}


@pytest.mark.parametrize(
    ("time", "chunk", "key", "value"), [(1, 64, 8, 8), (7, 64, 8, 5), (64, 16, 5, 8), (50, 16, 8, 8), (65, 64, 16, 16)]
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
        return gated_delta_rule(*leaves[:5], seq=seq, initial_state_BHKV=leaves[5], chunk=4)

    assert torch.autograd.gradcheck(outputs, x)


def transformers_rule(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    return getattr(modeling, name)


@pytest.mark.parametrize("name", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_equals_transformers_with_gradients(name: str, backend: str) -> None:
    rule = transformers_rule(name)
    x = inputs(2, 70, 2, 16, 8, torch.float32)
    theirs = rule(
        x[0], x[1], x[2], x[3], x[4], initial_state=x[5], output_final_state=True, use_qk_l2norm_in_kernel=False
    )
    assert_all_close(with_gradients(run(x, backend), x), with_gradients(theirs, x), 1e-5, 1e-4)


def test_step_after_step_equals_forward() -> None:
    x = inputs(2, 20, 3, 8, 5, torch.float32)
    o_BTHV, final_BHKV = run(x, "torch", chunk=8)
    with torch.no_grad():
        state_BHKV = x[5].clone()
        for t in range(20):
            q_BHK, k_BHK, v_BHV, log_alpha_BH, beta_BH = (a[:, t] for a in x[:5])
            o_BHV = gated_delta_step(q_BHK, k_BHK, v_BHV, log_alpha_BH, beta_BH, state_BHKV)
            torch.testing.assert_close(o_BHV, o_BTHV[:, t], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state_BHKV, final_BHKV, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("split", [1, 15, 16, 17, 49])
def test_two_parts_with_the_state_carried_equal_the_whole(split: int) -> None:
    x = inputs(2, 50, 2, 8, 8, torch.float64)
    o_BTHV, final_BHKV = run(x, "torch")
    first_BTHV, state_BHKV = gated_delta_rule(*(a[:, :split] for a in x[:5]), initial_state_BHKV=x[5], chunk=16)
    seq = Layout.continuing(torch.full((2,), split), torch.ones(2, 50 - split, dtype=torch.bool))
    second_BTHV, last_BHKV = gated_delta_rule(
        *(a[:, split:] for a in x[:5]), seq=seq, initial_state_BHKV=state_BHKV, chunk=16
    )
    torch.testing.assert_close(torch.cat([first_BTHV, second_BTHV], dim=1), o_BTHV)
    torch.testing.assert_close(last_BHKV, final_BHKV)


def test_padding_behind_a_row_leaves_its_state_as_it_was() -> None:
    x = inputs(2, 20, 2, 8, 8, torch.float64)
    valid_BT = torch.arange(20) < torch.tensor([[13], [0]])
    o_BTHV, final_BHKV = run(x, "torch", Layout.continuing(torch.tensor([5, 5]), valid_BT), chunk=8)
    short_BTHV, short_BHKV = gated_delta_rule(*(a[:1, :13] for a in x[:5]), initial_state_BHKV=x[5][:1], chunk=8)
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
    perturbed_BTHV, perturbed_BHKV = gated_delta_rule(
        *mixed, seq=seq, initial_state_BHKV=other[5], backend=backend, chunk=16
    )
    assert torch.equal(o_BTHV[:, start:], perturbed_BTHV[:, start:])
    assert torch.equal(final_BHKV, perturbed_BHKV)
    assert not torch.equal(o_BTHV[:, :start], perturbed_BTHV[:, :start])
    d_x = torch.autograd.grad(o_BTHV[:, start:].sum() + final_BHKV.sum(), x)
    assert all(d[:, :start].abs().max() == 0 for d in d_x[:5])
    assert d_x[5].abs().max() == 0


@pytest.mark.parametrize("log_alpha", [0.0, -50.0, -1e4])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_extreme_gates_are_finite_and_right(log_alpha: float, beta: float) -> None:
    x = inputs(1, 40, 2, 8, 8, torch.float32)
    with torch.no_grad():
        x[3][:, ::3], x[4][:, 1::2] = log_alpha, beta
    got, expected = (with_gradients(run(x, backend), x) for backend in ("torch", "reference"))
    assert all(a.isfinite().all() for a in got)
    assert_all_close(got, expected, 1e-5, 1e-4)


def test_without_decay_and_with_beta_one_the_last_value_of_a_key_is_read_back() -> None:
    _, k_BTHK, v_BTHV, log_alpha_BTH, beta_BTH, _ = inputs(1, 8, 1, 8, 4, torch.float64)
    keys_BTHK = torch.eye(8, dtype=torch.float64)[None, [0, 1, 2, 0, 1, 3, 0, 2], None]
    o_BTHV, state_BHKV = gated_delta_rule(
        k_BTHK, keys_BTHK, v_BTHV, torch.zeros_like(log_alpha_BTH), torch.ones_like(beta_BTH), scale=1.0
    )
    torch.testing.assert_close(state_BHKV[0, 0, :4], v_BTHV[0, [6, 4, 7, 5], 0])
    assert o_BTHV.shape == v_BTHV.shape


@pytest.mark.parametrize("packed", [False, True])
def test_bf16_inputs_stay_within_one_percent_of_fp32(packed: bool) -> None:
    x = inputs(2, 256, 2, 32, 32, torch.float32)
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


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(UsageError, match="triton"):
        run(inputs(1, 4, 1, 2, 2, torch.float32), "triton")


def test_l2_normalize_gives_unit_vectors_and_passes_gradcheck() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(l2_normalize(x).norm(dim=-1), torch.ones(3, dtype=torch.float64), atol=1e-5, rtol=0)
    assert torch.autograd.gradcheck(l2_normalize, (x,))
    assert torch.equal(l2_normalize(torch.zeros(2, 4)), torch.zeros(2, 4))
    large = torch.full((1, 4), 2.0, dtype=torch.bfloat16)
    assert l2_normalize(large).dtype == torch.bfloat16
    assert math.isclose(l2_normalize(large)[0, 0].item(), 0.5)
