"""The chunked cross-entropy on a GPU, where its softmax is compiled, against the whole in fp32."""

import pytest
import torch
import torch.nn.functional as F

from swamla.ops import chunked_cross_entropy
from tests.gpu.checks import assert_parity, no_waiting, randn

pytestmark = pytest.mark.gpu


def labels(rows, vocabulary):
    found = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(0))
    found[::5] = -100
    return found.cuda()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "vocabulary", "chunk"), [(1000, 50304, None), (257, 1000, 64), (40, 50, 1000)])
def test_the_loss_and_its_gradients_are_those_of_all_logits(dtype, rows, vocabulary, chunk):
    wanted = labels(rows, vocabulary)
    assert_parity(
        lambda x, weight: [chunked_cross_entropy(x, weight, wanted, chunk=chunk)],
        lambda x, weight: [F.cross_entropy(x @ weight.T, wanted, reduction="sum")],
        [randn(rows, 64, dtype=dtype), 0.1 * randn(vocabulary, 64, dtype=dtype, seed=1)],
        tolerance={torch.bfloat16: 2e-2, torch.float32: 2e-3}[dtype],
    )


def test_the_host_does_not_wait_and_no_more_than_a_chunk_of_logits_and_the_gradients_is_held():
    rows, vocabulary = 8192, 50304
    wanted = labels(rows, vocabulary)
    x = randn(rows, 64, dtype=torch.bfloat16).requires_grad_()
    weight = randn(vocabulary, 64, dtype=torch.bfloat16, seed=1).requires_grad_()
    chunked_cross_entropy(x, weight, wanted).backward()  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with no_waiting():
        chunked_cross_entropy(x, weight, wanted).backward()
    chunk = rows * vocabulary * 2 / 4
    gradients = x.nbytes + weight.nbytes + 4 * weight.numel()  # of the weight's also the sum over chunks, in fp32
    assert torch.cuda.max_memory_allocated() - before <= chunk + gradients + 2**20
