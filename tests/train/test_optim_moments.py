"""Moments in fewer bits: bf16 is right on average, 8 bits are torchao's, and neither depends on what else is random."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from swamla.errors import Interrupted, MissingBackendError
from swamla.train.optim import AdamWConfig, LionConfig, elementwise
from swamla.train.optim import moments as moments_module
from swamla.train.optim.adamw import AdamW
from swamla.train.optim.lion import Lion
from swamla.train.optim.moments import moment_specs, round_stochastically_

from .helpers import MODEL, losses, run, tiny_config, weights
from .test_resume import digests, stop_after

SHAPES = [(64, 64), (64, 65), (3, 32, 128), (10,), (4095,), (15, 256)]  # the first and third are kept in 8 bits
LOW_BIT = [AdamWConfig(moments="bf16"), AdamWConfig(moments="8bit"), LionConfig(moments="bf16")]


def parameters(seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def grouped(params):
    return [{"params": params[::2], "weight_decay": 0.1}, {"params": params[1::2], "weight_decay": 0.0}]


def take_steps(params, optimizers, count, seed=1):
    """The same gradients for each optimizer's parameters, of sizes from 1e-6 to 1."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for of_all in zip(*params, strict=True):
            size = 10 ** (-6 * torch.rand((), generator=generator))
            gradient = torch.randn(of_all[0].shape, generator=generator) * size
            for p in of_all:
                p.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("value", [1.00048828125, 1.001, -3.14159, 1e-20, -1e-30, 12345.678])
def test_stochastic_rounding_gives_the_neighbours_and_on_average_the_number_itself(value):
    draws = 100_000
    rounded = round_stochastically_(torch.full((draws,), value), torch.Generator().manual_seed(0))
    assert torch.equal(rounded, rounded.bfloat16().float())
    low, high = rounded.min().item(), rounded.max().item()
    exact = torch.tensor(value).item()
    assert low < exact < high
    assert rounded.unique().numel() == 2
    assert high - low <= 2**-7 * abs(exact)
    deviation = (high - low) / 2 / math.sqrt(draws)  # at most, of the mean
    assert abs(rounded.double().mean().item() - exact) < 4 * deviation


def test_stochastic_rounding_leaves_alone_what_needs_none():
    exact = torch.tensor([0.0, -0.0, 1.0, -1.5, float("inf"), -float("inf"), 2.0**-126]).repeat(1000)
    rounded = round_stochastically_(exact.clone(), torch.Generator().manual_seed(0))
    assert torch.equal(rounded, exact)
    assert round_stochastically_(torch.tensor([float("nan")]), torch.Generator()).isnan().all()


def test_increments_below_half_a_bf16_step_survive_on_average():
    p = nn.Parameter(torch.zeros(4096))
    adamw = AdamW([{"params": [p], "weight_decay": 0.0}], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, moments="bf16")
    nearest = torch.zeros(4096, dtype=torch.bfloat16)
    for _ in range(800):
        p.grad = torch.ones(4096)
        adamw.step()
        nearest = (0.999 * nearest.float() + 0.001).bfloat16()
    expected = 1 - 0.999**800
    found = adamw.state[p]["exp_avg_sq"].double()
    assert abs(found.mean().item() - expected) < 5 * found.std().item() / 64
    assert nearest.double().mean().item() < 0.6 * expected  # rounded to the nearest, it would have stopped growing


def test_our_adamw_over_fp32_moments_takes_the_steps_of_torchs():
    ours, theirs = parameters(), parameters()
    a = AdamW(grouped(ours), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, moments="fp32")
    b = torch.optim.AdamW(grouped(theirs), lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    take_steps([ours, theirs], [a, b], 10)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)


def test_eight_bit_adamw_takes_the_steps_of_torchaos(monkeypatch):
    torchao = pytest.importorskip("torchao.optim")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    ours, theirs = parameters(), parameters()
    a = AdamW(grouped(ours), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, moments="8bit")
    b = torchao.AdamW8bit(grouped(theirs), lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    take_steps([ours, theirs], [a, b], 10)
    for p, q in zip(ours, theirs, strict=True):
        # A quotient that falls on the middle between two codes may go either way: a few numbers in ten thousand.
        same = (p - q).abs() <= 1e-6 + 1e-6 * q.abs()
        assert same.float().mean() > 0.999
        for name in ("exp_avg", "exp_avg_sq"):
            state, other = a.state[p], b.state[q][name]
            if p.numel() >= 4096 and p.numel() % 256 == 0:
                assert (state[f"{name}.codes"] == other.codes).float().mean() > 0.999
                torch.testing.assert_close(state[f"{name}.scale"], other.scale, atol=0, rtol=1e-5)
            else:
                torch.testing.assert_close(state[name], other, atol=1e-6, rtol=1e-6)


def test_eight_bit_lion_keeps_its_moment_as_torchao_would():
    torchao = pytest.importorskip("torchao.optim.subclass_8bit")
    p = parameters(shapes=[(64, 64)])[0]
    theta, kept = p.detach().clone(), torchao.OptimState8bit.zeros((64, 64))
    lion = Lion([{"params": [p], "weight_decay": 0.1}], lr=1e-2, betas=(0.9, 0.99), moments="8bit")
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        p.grad = torch.randn(64, 64, generator=generator)
        lion.step()
        moment = kept.dequantize()
        theta = theta * (1 - 1e-3) - 1e-2 * moment.lerp(p.grad, 0.1).sign()
        kept.copy_(moment.lerp(p.grad, 0.01))
    assert ((p - theta).abs() <= 1e-6).float().mean() > 0.999
    assert (lion.state[p]["exp_avg.codes"] == kept.codes).float().mean() > 0.999


@pytest.mark.parametrize("shape", SHAPES)
def test_the_tensors_that_torchao_keeps_in_fp32_we_keep_in_fp32(shape):
    torchao = pytest.importorskip("torchao.optim")
    theirs = torchao.AdamW8bit([nn.Parameter(torch.zeros(1))])._new_buffer(torch.zeros(shape), True)
    assert (set(moment_specs("m", shape, "8bit")) == {"m"}) == (type(theirs) is torch.Tensor)


@pytest.mark.parametrize("config", [*LOW_BIT, LionConfig(), LionConfig(moments="8bit")])
def test_low_bit_moments_stay_close_to_fp32_ones(config):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList(parameters())

    model, exact = Model(), Model()
    a = config.build(model, lr=1e-3, weight_decay=0.1)
    b = replace(config, moments="fp32").build(exact, lr=1e-3, weight_decay=0.1)
    take_steps([list(model.parameters()), list(exact.parameters())], [a, b], 20)
    for before, p, q in zip(parameters(), model.parameters(), exact.parameters(), strict=True):
        assert not torch.equal(p, before)
        assert torch.linalg.norm(p - q) <= 0.2 * torch.linalg.norm(q - before)


@pytest.mark.parametrize("make", [
    lambda groups: Lion(groups, lr=1e-2, betas=(0.9, 0.99), moments="fp32"),
    lambda groups: AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, moments="8bit"),
])  # fmt: skip
def test_the_size_of_the_pieces_changes_nothing(monkeypatch, make):
    found = []
    for size in (256, 1 << 12, 1 << 24):
        monkeypatch.setitem(elementwise.CHUNK, "cpu", size)
        params = parameters()
        take_steps([params], [make(grouped(params))], 3)
        found.append(params)
    assert all(torch.equal(p, q) and torch.equal(p, r) for p, q, r in zip(*found, strict=True))


def test_no_list_of_pieces_has_more_numbers_than_a_piece_may_have(monkeypatch):
    monkeypatch.setitem(elementwise.CHUNK, "cpu", 4096)
    sizes = []
    real = AdamW.update

    def seen(self, pieces, values, group):
        sizes.append(sum(len(piece.weights) for piece in pieces))
        return real(self, pieces, values, group)

    monkeypatch.setattr(AdamW, "update", seen)
    params = parameters()
    take_steps([params], [AdamW(grouped(params), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, moments="bf16")], 1)
    assert max(sizes) <= 4096
    assert sum(sizes) == sum(p.numel() for p in params)


def test_the_noise_depends_on_nothing_random_and_disturbs_nothing_random():
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        params = parameters()
        optimizer = AdamW(grouped(params), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, moments="bf16")
        take_steps([params], [optimizer], 3)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


def test_each_step_draws_noise_of_its_own():
    p = nn.Parameter(torch.zeros(1000))
    lion = Lion([{"params": [p], "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.0), moments="bf16")
    kept = []
    for _ in range(2):
        p.grad = torch.full((1000,), 1.001)  # beta2 = 0: the moment is the gradient
        lion.step()
        kept.append(lion.state[p]["exp_avg"].clone())
    assert not torch.equal(*kept)


@pytest.mark.parametrize("config", [AdamWConfig(moments="8bit"), LionConfig(moments="8bit")])
def test_without_torchao_eight_bits_are_refused_with_the_command_that_installs_it(monkeypatch, config):
    moments_module.require_torchao.cache_clear()
    monkeypatch.setitem(sys.modules, "torchao.optim.subclass_8bit", None)
    with pytest.raises(MissingBackendError, match=r"moments = 8bit needs torchao: pip install 'swamla\[fp8\]'"):
        config.build(nn.Linear(4, 4), lr=1e-3, weight_decay=0.1)
    moments_module.require_torchao.cache_clear()


@pytest.mark.parametrize("config", [*LOW_BIT, LionConfig(), LionConfig(moments="8bit")], ids=str)
def test_a_run_resumed_is_to_the_bit_the_uninterrupted_one(tmp_path, monkeypatch, dataset, config):
    config = tiny_config(replace(MODEL, vocab_size=512), steps=4, optimizer=config)
    expected = run(config, tmp_path / "whole", dataset)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted):
            run(config, tmp_path / "run", dataset)
    torch.manual_seed(99)
    state = run(config, tmp_path / "run", dataset, resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert digests(tmp_path / "run", 4) == digests(tmp_path / "whole", 4)
    assert all(torch.equal(p, weights(expected)[name]) for name, p in weights(state).items())
    assert any(key.endswith(".codes") for key in state.optimizer.state_tensors()) == (
        config.train.optimizer.moments == "8bit"
    )
