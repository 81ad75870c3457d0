"""Muon's options: each equal to its paper's algorithm, restored to the bit, and off by default."""

from dataclasses import replace

import pytest
import torch

from swamla.errors import ConfigError, Interrupted
from swamla.train.optim import MuonConfig

from .helpers import losses, model_of, run, tiny_config
from .test_optim import take_steps, tiny_model
from .test_resume import digests, stop_after

OPTIONS = {
    "momentum_warmup": MuonConfig(momentum_warmup=0.7),
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
