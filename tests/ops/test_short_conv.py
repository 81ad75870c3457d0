"""The short convolution against torch's own and against documents computed one at a time."""

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swamla.errors import UsageError
from swamla.ops.layout import Layout
from swamla.ops.short_conv import short_conv, short_conv_step

MODULE = importlib.import_module("swamla.ops.short_conv.cpu")  # `swamla.ops.short_conv` is the function
BACKENDS = ["reference", "torch"]
both_activations = pytest.mark.parametrize("activation", ["silu", "none"])


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(MODULE, "BLOCK", 40)  # five rows of eight: blocks end inside rows and documents
    monkeypatch.setattr(MODULE, "THREADS_BLOCK", 40)


def torch_conv(x_BTD: Tensor, weight_DW: Tensor, history_BWD: Tensor, activation: str = "silu") -> Tensor:
    line_BDS = torch.cat([history_BWD, x_BTD], dim=1).mT
    y_BDT = F.conv1d(line_BDS, weight_DW[:, None], groups=weight_DW.shape[0])
    return (F.silu(y_BDT) if activation == "silu" else y_BDT).mT


def inputs(batch: int, time: int, dtype: torch.dtype = torch.float64, taps: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    x_BTD = torch.randn(batch, time, 8, dtype=dtype, requires_grad=True)
    weight_DW = torch.randn(8, taps, dtype=dtype, requires_grad=True)
    history_BWD = torch.randn(batch, taps - 1, 8, dtype=dtype, requires_grad=True)
    return x_BTD, weight_DW, history_BWD


def assert_same_with_gradients(got: Tensor, expected: Tensor, leaves: tuple[Tensor, ...], tolerance: float) -> None:
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    d_y = torch.randn_like(expected)
    got_gradients = torch.autograd.grad(got, leaves, d_y)
    for mine, theirs in zip(got_gradients, torch.autograd.grad(expected, leaves, d_y), strict=True):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("time", "taps"), [(1, 4), (2, 4), (23, 4), (23, 2), (9, 1)])
@both_activations
def test_equals_torch_conv1d_with_gradients(backend: str, time: int, taps: int, activation: Any) -> None:
    x_BTD, weight_DW, history_BWD = leaves = inputs(3, time, taps=taps)
    got = short_conv(x_BTD, weight_DW, history_BWD=history_BWD, activation=activation, backend=backend)
    assert_same_with_gradients(got, torch_conv(x_BTD, weight_DW, history_BWD, activation), leaves, 1e-12)


@pytest.mark.parametrize("piece", [4, 5, 512])
@pytest.mark.parametrize("block", [1, 100, 1000])
@pytest.mark.parametrize("taps", [1, 2, 4])
@both_activations
def test_what_onednn_computes_for_several_threads_equals_the_reference(
    block: int, piece: int, taps: int, activation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "BLOCK", 0)  # nothing is too small
    monkeypatch.setattr(MODULE, "THREADS_BLOCK", block)
    monkeypatch.setattr(MODULE, "PIECE", piece)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    document_BT = torch.tensor([[0] * 5 + [1] * 2 + [2] + [3] * 12 + [-1] * 3, [0] * 23])
    leaves = x_BTD, weight_DW, history_BWD = inputs(2, 23, torch.float32, taps)
    seq = Layout.from_documents(document_BT)
    got, expected = (
        short_conv(x_BTD, weight_DW, seq=seq, history_BWD=history_BWD, activation=activation, backend=backend)
        for backend in ("torch", "reference")
    )
    assert_same_with_gradients(got, expected, leaves, 1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_inputs_whose_channels_lie_apart_are_read_as_they_are(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a transposed tensor has them, or one that is a part of another."""
    monkeypatch.setattr(MODULE, "BLOCK", 0 if threads > 1 else 40)
    monkeypatch.setattr(MODULE, "THREADS_BLOCK", 100)
    monkeypatch.setattr(MODULE, "PIECE", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weight_DW, d_y = torch.randn(8, 4, requires_grad=True), torch.randn(1, 8, 50).mT
    for x_BTD in (torch.randn(1, 8, 50).mT, torch.randn(1, 50, 24)[..., 8:16]):
        leaves = x_BTD.requires_grad_(), weight_DW
        got, expected = (short_conv(*leaves, backend=backend) for backend in ("torch", "reference"))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        gradients, wanted = (torch.autograd.grad(y, leaves, d_y) for y in (got, expected))
        torch.testing.assert_close(gradients, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@both_activations
def test_packed_documents_equal_each_computed_alone(backend: str, activation: Any) -> None:
    lengths = [[1, 1, 2, 3, 9, 4], [7, 5, 1, 4, 3]]
    document_BT = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in lengths])
    x_BTD, weight_DW, history_BWD = leaves = inputs(2, 20)
    options: Any = {"history_BWD": history_BWD, "activation": activation, "backend": backend}
    got = short_conv(x_BTD, weight_DW, seq=Layout.from_documents(document_BT), **options)
    rows = []
    for row, row_lengths in enumerate(lengths):
        pasts = [history_BWD[row : row + 1]] + [torch.zeros(1, 3, 8, dtype=torch.float64)] * (len(row_lengths) - 1)
        parts = zip(x_BTD[row : row + 1].split(row_lengths, dim=1), pasts, strict=True)
        rows.append(torch.cat([torch_conv(part, weight_DW, past, activation) for part, past in parts], dim=1))
    assert_same_with_gradients(got, torch.cat(rows), leaves, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("start", [1, 4, 5, 6, 12])
def test_a_document_sees_nothing_of_the_one_before_it(backend: str, start: int) -> None:
    seq = Layout.from_documents((torch.arange(20) >= start).long()[None])
    x_BTD, weight_DW, history_BWD = inputs(1, 20, torch.float32)
    other_BTD = torch.where(torch.arange(20)[:, None] < start, float("nan"), x_BTD).detach().requires_grad_()
    y_BTD, poisoned_BTD = (
        short_conv(x, weight_DW, seq=seq, history_BWD=history_BWD, backend=backend)[:, start:]
        for x in (x_BTD, other_BTD)
    )
    assert torch.equal(y_BTD, poisoned_BTD)
    (d_x_BTD,) = torch.autograd.grad(y_BTD.sum(), x_BTD)
    assert d_x_BTD[:, :start].abs().max() == 0
    assert d_x_BTD[:, start:].abs().min() > 0


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("split", [1, 2, 3, 11, 19])
def test_a_row_continued_from_its_history_equals_the_whole_row(backend: str, split: int) -> None:
    x_BTD, weight_DW, history_BWD = inputs(2, 20, torch.float32)
    whole_BTD = short_conv(x_BTD, weight_DW, history_BWD=history_BWD, backend=backend)
    line_BSD = torch.cat([history_BWD, x_BTD], dim=1)
    seq = Layout.continuing(torch.full((2,), split), torch.ones(2, 20 - split, dtype=torch.bool))
    second_BTD = short_conv(
        x_BTD[:, split:], weight_DW, seq=seq, history_BWD=line_BSD[:, split : split + 3], backend=backend
    )
    torch.testing.assert_close(second_BTD, whole_BTD[:, split:], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("taps", [1, 2, 4])
@both_activations
def test_steps_of_any_lengths_keep_the_last_inputs_and_equal_the_whole_row(taps: int, activation: Any) -> None:
    x_BTD, weight_DW, history_BWD = (tensor.detach() for tensor in inputs(2, 20, torch.float32, taps))
    whole_BTD = torch_conv(x_BTD, weight_DW, history_BWD, activation)
    line_BSD, begin = torch.cat([history_BWD, x_BTD], dim=1), 0
    for length in (1, 3, 1, 1, 9, 5):
        seq = Layout.continuing_uniform(begin, 2, length)
        piece_BTD, begin = x_BTD[:, begin : begin + length], begin + length
        got = short_conv_step(piece_BTD, weight_DW, history_BWD, seq, activation=activation)
        torch.testing.assert_close(got, whole_BTD[:, begin - length : begin], atol=1e-6, rtol=1e-6)
        assert torch.equal(history_BWD, line_BSD[:, begin : begin + taps - 1])


def test_bf16_stays_close_to_fp32() -> None:
    x_BTD, weight_DW, _ = inputs(2, 30, torch.float32)
    low_BTD = x_BTD.detach().bfloat16().requires_grad_()
    exact_BTD = short_conv(low_BTD.float(), weight_DW, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_BTD = short_conv(low_BTD, weight_DW, backend="torch")
    assert y_BTD.dtype == torch.bfloat16
    d_y = torch.randn_like(exact_BTD)
    got = (y_BTD, *torch.autograd.grad(y_BTD, (low_BTD, weight_DW), d_y.bfloat16()))
    expected = (exact_BTD, *torch.autograd.grad(exact_BTD, (low_BTD, weight_DW), d_y))
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine.float() - theirs).norm() <= 1e-2 * theirs.norm()


def test_takes_a_slice_of_a_wider_projection() -> None:
    wide_BTE = torch.randn(2, 20, 24)
    _, weight_DW, _ = inputs(1, 1, torch.float32)
    x_BTD = wide_BTE[..., 8:16]
    whole, sliced = (short_conv(x, weight_DW, backend="torch") for x in (x_BTD.contiguous(), x_BTD))
    assert torch.equal(whole, sliced)


def test_an_unknown_backend_or_activation_is_refused() -> None:
    x_BTD, weight_DW, _ = inputs(1, 4)
    with pytest.raises(UsageError, match="activation = 'gelu': short_conv has 'silu', 'none'"):
        short_conv(x_BTD, weight_DW, activation="gelu")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="'flash': short_conv has 'auto', 'reference', 'torch', 'fla'"):
        short_conv(x_BTD, weight_DW, backend="flash")


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("packed", [False, True], ids=["whole rows", "packed rows"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@both_activations
def test_what_a_graph_on_a_gpu_holds_equals_the_reference(
    taps: int, packed: bool, dtype: torch.dtype, activation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("swamla.ops.short_conv"), "is_fused", lambda x: True)
    x_BTD, weight_DW, _ = inputs(2, 23, dtype, taps)
    document_BT = torch.tensor([[0] * 5 + [1] * 2 + [2] + [3] * 12 + [-1] * 3, [0] * 23])
    seq = Layout.from_documents(document_BT) if packed else None
    torch._dynamo.reset()
    compiled = torch.compile(short_conv, backend="aot_eager", fullgraph=True)
    for compute in (short_conv, compiled):
        expected = short_conv(x_BTD, weight_DW, seq=seq, activation=activation, backend="reference")
        got = compute(x_BTD, weight_DW, seq=seq, activation=activation)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        assert_same_with_gradients(got, expected, (x_BTD, weight_DW), tolerance)


def test_in_a_graph_on_a_gpu_a_nan_stays_in_its_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("swamla.ops.short_conv"), "is_fused", lambda x: True)
    x_BTD, weight_DW, _ = inputs(1, 12)
    with torch.no_grad():
        x_BTD[0, 5] = torch.nan
    seq = Layout.from_documents(torch.tensor([[0] * 4 + [1] * 3 + [2] * 5]))
    got = short_conv(x_BTD, weight_DW, seq=seq)
    (dx_BTD,) = torch.autograd.grad(got[:, [*range(4), *range(7, 12)]].sum(), x_BTD)
    for found in (got, dx_BTD):
        assert found[0, [*range(4), *range(7, 12)]].isfinite().all()


@pytest.mark.parametrize("time", [1, 2, 3])
def test_what_a_graph_on_a_gpu_holds_takes_rows_shorter_than_the_taps(
    time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("swamla.ops.short_conv"), "is_fused", lambda x: True)
    x_BTD, weight_DW, _ = inputs(2, time)
    expected = short_conv(x_BTD, weight_DW, backend="reference")
    assert_same_with_gradients(short_conv(x_BTD, weight_DW), expected, (x_BTD, weight_DW), 1e-12)
