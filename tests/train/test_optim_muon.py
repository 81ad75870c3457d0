"""Muon's options: each equal to its paper's algorithm, restored to the bit, and off by default."""

from dataclasses import replace

import pytest
import torch

from swamla.errors import ConfigError, Interrupted
from swamla.train.optim import Muon, MuonConfig

from .helpers import losses, model_of, run, tiny_config
from .test_optim import matrices, take_steps, tiny_model
from .test_resume import digests, stop_after

OPTIONS = {
    "momentum_warmup": MuonConfig(momentum_warmup=0.7),
    "cautious": MuonConfig(decay="cautious"),
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
