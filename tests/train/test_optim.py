"""Optimizers: equal to torch's, grouped as they should be, named and restored exactly."""

import pytest
import torch
from torch import nn

from swamla.errors import CorruptError
from swamla.train.optim import AdamWConfig, Muon, MuonConfig
from swamla.train.optim import muon as muon_module
from swamla.train.optim.muon import COEFFICIENTS, is_hidden_matrix, orthogonalise, orthogonalise_all

from .helpers import MODEL

SHAPES = [(24, 16), (16, 24), (16, 16), (64, 16), (16, 24)]


def tiny_model(seed=0):
    from dataclasses import replace

    torch.manual_seed(seed)
    return replace(MODEL, vocab_size=40).build()


def take_steps(model, optimizer, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.set_lr(1e-2)
        optimizer.step()


def matrices(seed):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]


def test_stacked_muon_takes_the_steps_of_torch_muon():
    ours, theirs = matrices(0), matrices(0)
    a = Muon(ours, lr=1e-2, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for before, p, q in zip(matrices(0), ours, theirs, strict=True):
        # Both run Newton-Schulz in bf16, in another order of summation: 1e-2 of the way moved is its rounding.
        assert torch.linalg.norm(p - q) <= 1e-2 * torch.linalg.norm(q - before)


def test_in_fp32_stacked_newton_schulz_is_the_loop_over_matrices(monkeypatch):
    monkeypatch.setattr(muon_module, "bf16_is_fast", lambda device: False)
    stack = [p.detach() for p in matrices(0)]
    for matrix, found in zip(stack, orthogonalise_all(stack, 5), strict=True):
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        a, b, c = COEFFICIENTS
        x = (wide / wide.norm()).double()
        for _ in range(5):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        expected = x if matrix.shape[0] <= matrix.shape[1] else x.T
        torch.testing.assert_close(found, expected.float(), atol=2e-6, rtol=2e-6)


def test_orthogonalised_matrices_have_singular_values_near_one():
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(3, 16, 40, generator=generator)
    values = torch.linalg.svdvals(orthogonalise(stack, 5))
    assert 0.6 < values.min() <= values.max() < 1.3


def test_muon_takes_the_matrices_inside_the_blocks_and_adamw_the_rest():
    model = tiny_model()
    taken = {name for name, p in model.named_parameters() if is_hidden_matrix(name, p)}
    assert taken == {n for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2}
    assert not is_hidden_matrix("embedding.weight", model.embedding.weight)
    assert not is_hidden_matrix("head.weight", model.head.weight)
    assert not is_hidden_matrix("blocks.0.mixer.conv_weight", nn.Parameter(torch.zeros(64, 4)))
    optimizer = MuonConfig().build(model, lr=1e-3, weight_decay=0.1)
    owned = [p for part in optimizer.parts for group in part.optimizer.param_groups for p in group["params"]]
    assert len(owned) == len(set(owned)) == len(list(model.parameters()))


@pytest.mark.parametrize("config", [AdamWConfig(), MuonConfig()])
def test_weight_decay_leaves_gains_biases_and_embeddings_alone(config):
    model = tiny_model()
    optimizer = config.build(model, lr=1e-2, weight_decay=0.5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        shrinks = p.ndim >= 2 and name != "embedding.weight"
        factor = 1 - 1e-2 * 0.5 if shrinks else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor)


@pytest.mark.parametrize("config", [AdamWConfig(), MuonConfig()])
def test_steps_are_the_same_to_the_bit_every_time(config):
    found = []
    for _ in range(2):
        model = tiny_model()
        take_steps(model, config.build(model, lr=1e-2, weight_decay=0.1), 3)
        found.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("config", [AdamWConfig(), MuonConfig()])
def test_a_restored_optimizer_goes_on_to_the_bit(config):
    model, twin = tiny_model(), tiny_model()
    optimizer = config.build(model, lr=1e-2, weight_decay=0.1)
    take_steps(model, optimizer, 3)
    twin.load_state_dict(model.state_dict())
    other = config.build(twin, lr=1e-2, weight_decay=0.1)
    state = {k: v.clone() for k, v in optimizer.state_tensors().items()}
    other.load_state_tensors(state, stateless=optimizer.stateless(), origin="here")
    take_steps(model, optimizer, 2, seed=9)
    take_steps(twin, other, 2, seed=9)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_missing_optimizer_state_is_named():
    model = tiny_model()
    optimizer = AdamWConfig().build(model, lr=1e-2, weight_decay=0.1)
    take_steps(model, optimizer, 1)
    state = {k: v for k, v in optimizer.state_tensors().items() if not k.startswith("embedding.weight/")}
    with pytest.raises(CorruptError, match=r"here: no optimizer state for embedding\.weight"):
        optimizer.load_state_tensors(state, stateless=[], origin="here")


def test_optimizer_state_of_another_shape_is_refused():
    model = tiny_model()
    optimizer = AdamWConfig().build(model, lr=1e-2, weight_decay=0.1)
    take_steps(model, optimizer, 1)
    state = optimizer.state_tensors() | {"embedding.weight/exp_avg": torch.zeros(2, 2)}
    with pytest.raises(CorruptError, match=r"embedding\.weight/exp_avg: got \(2, 2\), expected \(40, 16\)"):
        optimizer.load_state_tensors(state, stateless=[], origin="here")


def test_an_optimizer_of_another_kind_does_not_take_the_state():
    model = tiny_model()
    adamw = AdamWConfig().build(model, lr=1e-2, weight_decay=0.1)
    take_steps(model, adamw, 1)
    muon = MuonConfig().build(model, lr=1e-2, weight_decay=0.1)
    with pytest.raises(CorruptError, match="optimizer state"):
        muon.load_state_tensors(adamw.state_tensors(), stateless=[], origin="here")
