"""Muon's options: each equal to its paper's algorithm, restored to the bit, and off by default."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from swamla.errors import ConfigError, Interrupted
from swamla.train.optim import Muon, MuonConfig
from swamla.train.optim.muon import POLAR_EXPRESS, orthogonalise, polynomials

from .helpers import losses, model_of, run, tiny_config
from .test_optim import matrices, take_steps, tiny_model
from .test_resume import digests, stop_after

OPTIONS = {
    "momentum_warmup": MuonConfig(momentum_warmup=0.7),
    "cautious": MuonConfig(decay="cautious"),
    "polar_express": MuonConfig(coefficients="polar_express"),
    "normuon": MuonConfig(normuon=0.9),
    "all": MuonConfig(momentum_warmup=0.7, decay="cautious", coefficients="polar_express", normuon=0.9),
}


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    """Most of a tiny run's time."""
    monkeypatch.setattr("swamla.train.loop.plot_losses", lambda *args, **options: None)


@pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS)
def test_a_run_with_the_option_differs_and_resumes_to_the_bit(tmp_path, monkeypatch, dataset, config):
    settings = tiny_config(model_of("gdn", "mla"), optimizer=config)
    plain = replace(settings, train=replace(settings.train, optimizer=MuonConfig()))
    run(settings, tmp_path / "whole", dataset)
    run(plain, tmp_path / "plain", dataset)
    assert losses(tmp_path / "whole") != losses(tmp_path / "plain")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted):
            run(settings, tmp_path / "run", dataset)
    run(settings, tmp_path / "run", dataset, resume=True)
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")


def test_the_momentum_warms_up_by_steps_or_by_a_share_of_the_run():
    by_steps, by_share = MuonConfig(momentum_warmup=300), MuonConfig(momentum_warmup=0.25, momentum=0.9)
    # modded-nanogpt: frac = min(step / 300, 1); momentum = (1 - frac) * 0.85 + frac * 0.95
    for step in (1, 30, 299, 300, 1000):
        frac = min(step / 300, 1)
        expected = (1 - frac) * 0.85 + frac * 0.95
        assert by_steps.momentum_at(0.5, step - 1) == pytest.approx(expected, abs=1e-12)
    assert [by_share.momentum_at(p, 7) for p in (0, 0.125, 0.25, 1)] == pytest.approx([0.85, 0.875, 0.9, 0.9])
    assert MuonConfig(momentum=0.5, momentum_warmup=9).momentum_at(0.0, 0) == 0.5
    assert MuonConfig().momentum_at(0.0, 0) == 0.95
    with pytest.raises(ConfigError, match=r"momentum_warmup = -1"):
        MuonConfig(momentum_warmup=-1)


def test_a_step_has_the_momentum_of_its_progress():
    ends = []
    for config, progress in ((MuonConfig(momentum_warmup=0.5), 0.25), (MuonConfig(momentum=0.9), 1.0)):
        model = tiny_model()
        optimizer = config.build(model, lr=1e-2, weight_decay=0.1)
        optimizer.set_progress(progress, 3)
        take_steps(model, optimizer, 2)
        ends.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))  # halfway from 0.85 to 0.95


def test_cautious_weight_decay_is_that_of_the_paper():
    """Algorithm 1 of arXiv 2510.12402: x ← x − η(u + λ·1[u·x ≥ 0]·x), u the update without weight decay."""
    lr, strength, generator = 1e-2, 0.5, torch.Generator().manual_seed(1)
    params, twins = matrices(0), matrices(0)
    cautious = Muon(params, lr=lr, weight_decay=strength, decay="cautious")
    bare = Muon(twins, lr=lr, weight_decay=0.0)
    for _ in range(3):
        before = [p.detach().clone() for p in params]
        for p, twin in zip(params, twins, strict=True):
            twin.data.copy_(p.detach())
            p.grad = torch.randn(p.shape, generator=generator)
            twin.grad = p.grad.clone()
        cautious.step()
        bare.step()
        for x, p, twin in zip(before, params, twins, strict=True):
            u = (x - twin.detach()) / lr
            expected = torch.empty_like(x)
            for place in range(x.numel()):  # written out
                x_i, u_i = x.flatten()[place], u.flatten()[place]
                expected.view(-1)[place] = x_i - lr * (u_i + (strength * x_i if u_i * x_i >= 0 else 0.0))
            torch.testing.assert_close(p.detach(), expected, atol=1e-6, rtol=0)


def best_quintic(low, high):
    """The odd quintic closest to 1 on [low, high] by Remez' exchange (arXiv 2505.16932, algorithm 2)."""
    if low / high >= 1 - 5e-6:  # what it converges to
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    inner, outer, error, last = (3 * low + high) / 4, (low + 3 * high) / 4, math.inf, None
    while last is None or abs(last - error) > 1e-15:
        last = error
        points = np.array([low, inner, outer, high])
        system = np.stack([points, points**3, points**5, [1, -1, 1, -1]], axis=1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        inner, outer = np.sqrt((-3 * b + np.array([-1, 1]) * math.sqrt(9 * b * b - 20 * a * c)) / (10 * c))
    return a, b, c


def test_the_coefficients_of_polar_express_are_those_that_its_algorithm_finds():
    """Algorithm 1 of the paper: the best quintic for the interval that the ones before leave, recentred around 1."""
    low, high, cushion = 1e-3, 1.0, 0.02407327424182761
    for known in POLAR_EXPRESS:
        abc = np.array(best_quintic(max(low, cushion * high), high))
        at = [np.dot(abc, [x, x**3, x**5]) for x in (low, high)]
        abc *= 2 / sum(at)
        assert abc == pytest.approx(known, rel=1e-5)
        low = np.dot(abc, [low, low**3, low**5])
        high = 2 - low


def test_polar_express_is_that_of_the_papers_code():
    """Listing 1 of the paper, in fp64."""
    x = torch.randn(3, 16, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in POLAR_EXPRESS[:-1]] + [POLAR_EXPRESS[-1]]
    for iterations in (1, 5, 8, 11):
        expected = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
        for a, b, c in table[:iterations] + [table[-1]] * (iterations - len(table)):
            gram = expected @ expected.mT
            expected = a * expected + (b * gram + c * gram @ gram) @ expected
        found = orthogonalise(x, polynomials("polar_express", iterations))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(found, u @ vh, atol=1e-6, rtol=0)  # where Jordan's coefficients never arrive


def test_polar_express_gets_closer_to_orthogonal_in_as_many_iterations():
    x = torch.randn(8, 64, 64, generator=torch.Generator().manual_seed(0))
    off = {
        name: (torch.linalg.svdvals(orthogonalise(x, polynomials(name, 5))) - 1).square().mean().item()
        for name in ("jordan", "polar_express")
    }
    assert off["polar_express"] < 0.5 * off["jordan"]


def normuon_by_the_book(w, gradients, *, lr, weight_decay, beta1, beta2):
    """Algorithm 1 of arXiv 2510.05491, with Muon's Nesterov momentum, for a matrix (outputs, inputs)."""
    m, v = torch.zeros_like(w), torch.zeros(len(w))
    for g in gradients:
        m = beta1 * m + (1 - beta1) * g
        nesterov = (1 - beta1) * g + beta1 * m
        wide = nesterov if w.shape[0] <= w.shape[1] else nesterov.T
        o = orthogonalise(wide[None], polynomials("jordan", 5))[0]
        o = o if w.shape[0] <= w.shape[1] else o.T
        v = beta2 * v + (1 - beta2) * (o * o).mean(dim=1)
        o = o / (v[:, None].expand_as(o).sqrt() + 1e-10)
        step = 0.2 * lr * math.sqrt(w.numel()) / o.norm()
        w = w - lr * weight_decay * w - step * o
    return w


def test_normuon_is_that_of_the_paper_for_matrices_and_for_every_expert():
    settings, generator = {"lr": 1e-2, "weight_decay": 0.5}, torch.Generator().manual_seed(1)
    params = [*matrices(0), nn.Parameter(torch.randn(3, 24, 16, generator=generator))]
    before = [p.detach().clone() for p in params]
    gradients = [[torch.randn(p.shape, generator=generator) for p in params] for _ in range(4)]
    normuon = Muon(params, normuon=0.9, **settings)
    for given in gradients:
        for p, g in zip(params, given, strict=True):
            p.grad = g.clone()
        normuon.step()
    *linear, experts = range(len(params))
    for i in linear:
        expected = normuon_by_the_book(before[i], [g[i] for g in gradients], beta1=0.95, beta2=0.9, **settings)
        torch.testing.assert_close(params[i].detach(), expected, atol=2e-6, rtol=0)
    for e in range(3):  # stored (inputs, outputs)
        given = [g[experts][e].T for g in gradients]
        expected = normuon_by_the_book(before[experts][e].T, given, beta1=0.95, beta2=0.9, **settings).T
        torch.testing.assert_close(params[experts][e].detach(), expected, atol=2e-6, rtol=0)


def test_normuon_moves_all_neurons_equally_far_and_a_gradient_of_zero_moves_none():
    p, still = nn.Parameter(torch.zeros(16, 24)), nn.Parameter(torch.ones(16, 24))
    gradient = torch.randn(16, 24, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 0, 16)[:, None]
    optimizer = Muon([p, still], lr=1e-2, weight_decay=0.0, normuon=0.95)
    p.grad, still.grad = gradient, torch.zeros(16, 24)
    optimizer.step()
    torch.testing.assert_close(p.detach().square().mean(1).sqrt(), torch.full((16,), 2e-3))
    assert torch.equal(still.detach(), torch.ones(16, 24))
