"""What CUDA compiles of the chunked cross-entropy, as far as a CPU can tell."""

import pytest
import torch

from swamla.ops import cross_entropy
from swamla.ops.cross_entropy import _fused_losses_and_gradients, _losses_and_gradients, chunked_cross_entropy

IGNORE = -100
CAP = 15.0


def logits_and_labels(rows, vocabulary=50, dtype=torch.float32, scale=3.0):
    generator = torch.Generator().manual_seed(rows)
    logits = (scale * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[::5] = IGNORE
    return logits, labels


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str
)
@pytest.mark.parametrize("cap", [0.0, CAP])
@pytest.mark.parametrize("scale", [3.0, 300.0])
@pytest.mark.parametrize("need_gradients", [False, True])
def test_logits_turn_into_the_same_loss_and_gradients_as_slab_by_slab(dtype, tolerance, cap, scale, need_gradients):
    logits, labels = logits_and_labels(37, dtype=dtype, scale=scale)
    mine, theirs = logits.clone(), logits.clone()
    found = _fused_losses_and_gradients(mine, labels, IGNORE, cap, need_gradients)
    expected = _losses_and_gradients(theirs, labels, IGNORE, cap, need_gradients)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)
    assert torch.equal(mine, logits) != need_gradients


def test_it_is_one_graph_that_writes_in_place_and_serves_a_last_chunk_of_any_size():
    graphs = []

    def counted(graph, _):
        graphs.append(graph)
        return graph

    chunk_loss = torch.compile(_fused_losses_and_gradients, fullgraph=True, backend=counted)
    for rows in (20, 7, 11, 3):
        logits, labels = logits_and_labels(rows)
        expected = logits.clone()
        loss = _losses_and_gradients(expected, labels, IGNORE, CAP, True)
        torch.testing.assert_close(chunk_loss(logits, labels, IGNORE, CAP, True), loss)
        torch.testing.assert_close(logits, expected)
    assert len(graphs) == 2


def test_a_cpu_compiles_nothing(monkeypatch):
    monkeypatch.setattr(cross_entropy, "compiled", None)
    x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(6, 4)
    chunked_cross_entropy(x, weight, torch.arange(5)).backward()
