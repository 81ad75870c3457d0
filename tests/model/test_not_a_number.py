"""What is not a number stays in its document: outputs and input gradients of the others are what they were."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from swamla.model.mixers.mixer import Mixer
from swamla.ops.layout import Layout

from .helpers import (
    FFNS,
    MIXERS,
    WINDOW,
    assert_close,
    build_mixer,
    build_model,
    hybrid_config,
    packed,
    random_input,
    random_tokens,
)

LENGTHS = (5, 1, WINDOW, 70, 20)  # within a chunk of the delta rule, across one, and alone
PADDING = 6
TIME = sum(LENGTHS) + PADDING
BACKENDS = ("reference", "torch")
bad_numbers = pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_mixer = pytest.mark.parametrize("kind", MIXERS)


def layout() -> Layout:
    return packed(*LENGTHS, padding=PADDING)


def parts() -> list[slice]:
    """The tokens of each document, and of the padding."""
    bounds = torch.tensor([0, *LENGTHS, PADDING]).cumsum(0).tolist()
    return [slice(begin, end) for begin, end in pairwise(bounds)]


def run(mixer: Mixer, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Output and input gradient."""
    x = x.clone().requires_grad_()
    y = mixer(x, layout())
    y.backward(upstream)
    assert x.grad is not None
    return y.detach(), x.grad


def assert_same(found: Tensor, expected: Tensor, backend: str, what: str) -> None:
    if backend == "reference":
        assert torch.equal(found, expected), what
    else:
        assert_close(found, expected, 1e-5, what)


@bad_numbers
@every_backend
@every_mixer
def test_a_bad_input_reaches_no_other_document_forward_or_backward(kind: str, backend: str, bad: float) -> None:
    mixer = build_mixer(MIXERS[kind].with_backend(backend))
    x, upstream = random_input(1, TIME), random_input(1, TIME, seed=2)
    expected = run(mixer, x, upstream)
    for part in parts():
        poisoned, at = x.clone(), (part.start + part.stop) // 2
        poisoned[:, at] = bad
        found = run(mixer, poisoned, upstream)
        for other in parts():
            for mine, theirs, what in zip(found, expected, ("output", "gradient"), strict=True):
                if other != part:
                    assert_same(mine[:, other], theirs[:, other], backend, f"{what} of {other}, bad at {at}")
        if part != parts()[-1]:
            assert not found[0][:, at].isfinite().any(), "a bad number was hidden"


@every_backend
@every_mixer
def test_a_bad_gradient_reaches_no_other_document(kind: str, backend: str) -> None:
    mixer = build_mixer(MIXERS[kind].with_backend(backend))
    x, upstream = random_input(1, TIME), random_input(1, TIME, seed=2)
    _, expected = run(mixer, x, upstream)
    for part in parts()[:-1]:
        poisoned, at = upstream.clone(), (part.start + part.stop) // 2
        poisoned[:, at] = float("nan")
        _, found = run(mixer, x, poisoned)
        for other in parts():
            if other != part:
                assert_same(found[:, other], expected[:, other], backend, f"{other}, bad at {at}")
        assert not found[:, at].isfinite().any(), "a bad number was hidden"


@every_backend
@pytest.mark.parametrize("ffn", FFNS)
@torch.no_grad()
def test_through_a_whole_model_a_bad_token_changes_the_logits_of_its_document_alone(ffn: str, backend: str) -> None:
    model = build_model(hybrid_config(backend, ("gdn", "kda", "swa", "mla", "mha", "latent"), ffn)).eval()
    tokens = random_tokens(1, TIME, vocab_size=30)
    expected = model(tokens, layout())
    model.embedding.weight[30] = float("nan")  # which is the head's weight too: the logit of this token is left out
    for part in parts():
        poisoned = tokens.clone()
        poisoned[:, part.start] = 30
        found = model(poisoned, layout())
        for other in parts():
            if other != part:
                assert_close(found[:, other, :30], expected[:, other, :30], 3e-5, f"{other}, bad in {part}")


@every_backend
@every_mixer
@torch.no_grad()
def test_bad_padding_leaves_no_trace_in_a_state(kind: str, backend: str) -> None:
    mixer, time = build_mixer(MIXERS[kind].with_backend(backend)), 2 * WINDOW
    first, second, third = (random_input(2, time, seed=seed) for seed in range(3))
    lengths_B = torch.tensor([time, 3])
    valid_BT = torch.arange(time) < lengths_B[:, None]
    results = []
    for padding in (0.0, float("nan")):
        state = mixer.init_state(2, 3 * time, dtype=torch.float32, device="cpu")
        padded = first.where(valid_BT[..., None], padding)
        y = mixer.step(padded, state, Layout.continuing(torch.zeros(2, dtype=torch.int64), valid_BT))
        later = [
            mixer.step(x, state, Layout.continuing(lengths_B + begin, torch.ones(2, time, dtype=torch.bool)))
            for begin, x in ((0, second), (time, third))
        ]
        results.append(torch.cat([y.where(valid_BT[..., None], 0), *later], dim=1))
    assert torch.equal(results[0], results[1])


@every_mixer
@torch.no_grad()
def test_a_bad_row_leaves_the_other_rows_of_its_batch_as_they_are(kind: str) -> None:
    mixer, x = build_mixer(MIXERS[kind]), random_input(3, 40)
    poisoned = x.clone()
    poisoned[1, 7] = float("nan")
    outputs = []
    for each in (x, poisoned):
        state = mixer.init_state(3, 40, dtype=torch.float32, device="cpu")
        outputs.append([mixer(each, Layout.one_document_per_row(3, 40))])
        for begin, end in ((0, 30), (30, 31), (31, 40)):
            seq = Layout.continuing_uniform(begin, 3, end - begin)
            outputs[-1].append(mixer.step(each[:, begin:end], state, seq))
    for clean, found in zip(*outputs, strict=True):
        assert_close(found[[0, 2]], clean[[0, 2]], 1e-5)
