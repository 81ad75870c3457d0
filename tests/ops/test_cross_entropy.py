"""Chunked cross-entropy: equal to PyTorch's in value and gradients, without its logits."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode

from swamla.errors import ConfigError, DataError
from swamla.ops import chunked_cross_entropy

IGNORE = -100


def inputs(rows=37, width=8, vocabulary=50, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    labels = torch.randint(vocabulary, (rows,))
    labels[::5] = IGNORE
    return x, weight, labels


def full_cross_entropy(x, weight, labels, cap=0.0):
    logits = linear(x, weight) if x.dtype == torch.float64 else linear(x, weight).float()
    return cross_entropy(logits if cap == 0 else cap * torch.tanh(logits / cap), labels, reduction="sum")


def with_gradients(loss, x, weight, upstream=1.0):
    return [loss, *torch.autograd.grad(loss * upstream, (x, weight))]


@pytest.mark.parametrize("chunk", [None, 1, 10, 36, 37, 38, 1000])
@pytest.mark.parametrize("cap", [0.0, 1.5, 15.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_value_and_gradients_equal_the_whole_for_every_chunk(chunk, cap, dtype, tolerance):
    x, weight, labels = inputs(dtype=dtype)
    got = with_gradients(chunked_cross_entropy(x, weight, labels, cap=cap, chunk=chunk), x, weight)
    expected = with_gradients(full_cross_entropy(x, weight, labels, cap), x, weight)
    assert got[0].dtype == dtype
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_gradients_equal_finite_differences(cap):
    x, weight, labels = inputs(rows=5, width=3, vocabulary=4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: chunked_cross_entropy(x, w, labels, cap=cap, chunk=2), (x, weight))


def test_bounded_logits_of_any_size_have_a_finite_loss_and_gradients():
    x, weight, labels = inputs()
    for tensor in with_gradients(chunked_cross_entropy(1e6 * x, weight, labels, cap=15.0, chunk=7), x, weight):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("cap", [-1.0, float("nan"), float("inf")])
def test_a_cap_that_bounds_nothing_is_refused(cap):
    x, weight, labels = inputs()
    with pytest.raises(ConfigError, match="must be > 0"):
        chunked_cross_entropy(x, weight, labels, cap=cap)


def test_the_upstream_gradient_scales_both_gradients():
    x, weight, labels = inputs()
    got = with_gradients(chunked_cross_entropy(x, weight, labels, chunk=7), x, weight, upstream=0.37)
    expected = with_gradients(full_cross_entropy(x, weight, labels), x, weight, upstream=0.37)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_nothing_but_the_loss_is_computed_where_no_gradient_is_wanted(monkeypatch):
    x, weight, labels = inputs()
    expected = chunked_cross_entropy(x, weight, labels, chunk=7)
    monkeypatch.setattr("swamla.ops.cross_entropy._add_product", lambda *_: pytest.fail("a gradient was computed"))
    with torch.no_grad():
        assert torch.equal(chunked_cross_entropy(x, weight, labels, chunk=7), expected)


def test_a_confident_prediction_keeps_its_small_loss():
    logits = torch.tensor([[30.0, 20.8, 3.0, -5.0]])
    loss = chunked_cross_entropy(logits, torch.eye(4), torch.tensor([0]))
    exact = full_cross_entropy(logits.double(), torch.eye(4, dtype=torch.float64), torch.tensor([0]))
    torch.testing.assert_close(loss.double(), exact, rtol=1e-2, atol=0)


def test_a_graph_that_is_kept_gives_the_same_gradients_again():
    x, weight, labels = inputs()
    loss = chunked_cross_entropy(x, weight, labels, chunk=7) * 0.37
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_weights_gradient_is_handed_over_without_a_copy():
    x, weight, labels = inputs()
    loss = chunked_cross_entropy(x, weight, labels, chunk=7)
    held = loss.grad_fn.saved_tensors[1].data_ptr()
    (loss * 0.37).backward()
    assert weight.grad.data_ptr() == held


@pytest.mark.parametrize("frozen", ["x", "weight", "both"])
def test_what_needs_no_gradient_gets_none(frozen):
    x, weight, labels = inputs()
    x.requires_grad_(frozen not in ("x", "both"))
    weight.requires_grad_(frozen not in ("weight", "both"))
    loss = chunked_cross_entropy(x, weight, labels, chunk=7)
    torch.testing.assert_close(loss, full_cross_entropy(x, weight, labels), atol=1e-4, rtol=1e-5)
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.backward()
        assert (x.grad is None) == (frozen == "x")
        assert (weight.grad is None) == (frozen == "weight")


@pytest.mark.parametrize("rows", [0, 6])
def test_no_labels_give_zero_and_zero_gradients(rows):
    x, weight, _ = inputs(rows=rows)
    labels = torch.full((rows,), IGNORE)
    for tensor in with_gradients(chunked_cross_entropy(x, weight, labels, chunk=4), x, weight):
        assert (tensor == 0).all()


def test_another_label_may_be_the_one_ignored():
    x, weight, labels = inputs()
    relabelled = labels.where(labels != IGNORE, 3)
    labels = relabelled.where(relabelled != 3, IGNORE)
    got, expected = chunked_cross_entropy(x, weight, relabelled, ignore=3), chunked_cross_entropy(x, weight, labels)
    assert torch.equal(got, expected)


def test_large_logits_neither_overflow_nor_lose_the_loss():
    x, weight, labels = inputs()
    got = with_gradients(chunked_cross_entropy(1000 * x, weight, labels, chunk=5), x, weight)
    expected = with_gradients(full_cross_entropy(1000 * x.double(), weight.double(), labels), x, weight)
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine - theirs).norm() <= 1e-3 * theirs.norm()


def test_autocast_multiplies_in_bf16_and_sums_in_fp32():
    x, weight, labels = inputs(rows=400, width=64, vocabulary=300)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = with_gradients(chunked_cross_entropy(x, weight, labels, chunk=30), x, weight)
    rounded_x, rounded_weight = (t.detach().bfloat16().double().requires_grad_() for t in (x, weight))
    expected = with_gradients(full_cross_entropy(rounded_x, rounded_weight, labels), rounded_x, rounded_weight)
    plain = with_gradients(full_cross_entropy(x, weight, labels), x, weight)
    for mine, theirs, exact in zip(got, expected, plain, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() <= 1e-2 * theirs.norm()
        assert not torch.equal(mine, exact)  # bf16 was used


def test_the_gradient_of_the_weight_is_as_good_in_many_chunks_as_in_one():
    x, weight, labels = inputs(rows=2048, width=16, vocabulary=20)
    exact = with_gradients(full_cross_entropy(x.double(), weight.double(), labels), x, weight)[2]
    for chunk in (2048, 8):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = with_gradients(chunked_cross_entropy(x, weight, labels, chunk=chunk), x, weight)[2]
        assert (got - exact).norm() <= 1e-2 * exact.norm()


def test_inputs_in_bf16_get_gradients_in_bf16_and_a_loss_in_fp32():
    x, weight, labels = inputs(dtype=torch.bfloat16)
    loss, *gradients = with_gradients(chunked_cross_entropy(x, weight, labels), x, weight)
    assert loss.dtype == torch.float32
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any op returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_at_most_an_eighth_of_the_logits_is_ever_held():
    rows, vocabulary = 4000, 500
    x, weight, labels = inputs(rows=rows, vocabulary=vocabulary)
    with LargestTensor() as chunked:
        chunked_cross_entropy(x, weight, labels).backward()
    with LargestTensor() as whole:
        full_cross_entropy(x, weight, labels).backward()
    assert whole.elements == rows * vocabulary
    assert chunked.elements == rows * vocabulary // 8


def test_a_large_vocabulary_makes_small_chunks_and_smaller_slabs_in_fp32(monkeypatch):
    monkeypatch.setattr("swamla.ops.cross_entropy.LOGITS", 20_000)
    monkeypatch.setattr("swamla.ops.cross_entropy.SLAB", 2_000)
    x, weight, labels = inputs(rows=1000, vocabulary=500)
    with LargestTensor() as chunked:
        got = with_gradients(chunked_cross_entropy(x, weight, labels), x, weight)
    assert chunked.elements == 20_000
    for mine, theirs in zip(got, with_gradients(full_cross_entropy(x, weight, labels), x, weight), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("label", [50, 1000, -1, -99])
def test_a_label_outside_the_vocabulary_is_named_with_its_row(label):
    x, weight, labels = inputs()
    labels[17] = label
    with pytest.raises(DataError, match=rf"label {label} at row 17: must be in \[0, 50\), or -100 for no loss"):
        chunked_cross_entropy(x, weight, labels)


def test_a_chunk_of_no_rows_is_refused():
    with pytest.raises(ConfigError, match="chunk = 0: must be >= 1"):
        chunked_cross_entropy(*inputs(), chunk=0)
