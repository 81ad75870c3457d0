"""The averaged weights are what is judged and loaded; training itself never sees them."""

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import swamla
from swamla.checkpoint import latest_checkpoint
from swamla.errors import ConfigError, CorruptError, Interrupted
from swamla.train import TrainConfig, train
from swamla.train.ema import WeightAverage
from swamla.train.parallel.strategy import Strategy

from .helpers import held_out, losses, model_of, run, tiny_config, weights
from .test_resume import digests, stop_after


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    """Most of a tiny run's time."""
    monkeypatch.setattr("swamla.train.loop.plot_losses", lambda *args, **options: None)


def test_the_average_is_the_weighted_mean_of_the_weights_after_every_step():
    model, history = nn.Linear(3, 2), []
    average = WeightAverage(model, 0.9)
    for count in range(1, 8):
        with torch.no_grad():
            model.weight.normal_()
        history.append(model.weight.detach().double().clone())
        average.update(count)
        powers = 0.9 ** torch.arange(count - 1, -1, -1, dtype=torch.float64)
        expected = (torch.stack(history) * (powers / powers.sum())[:, None, None]).sum(0)
        torch.testing.assert_close(average.tensors()["weight"].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.25])
def test_an_average_fitted_to_the_run_has_its_width_however_long_the_run_is(width):
    """The weight of every step is read off by averaging one-hot weights; the oracle is i^γ and its deviation."""
    for steps in (400, 1600):
        model = nn.Linear(steps, 1, bias=False)
        average = WeightAverage(model, width=width)
        for step in range(steps):
            with torch.no_grad():
                model.weight.zero_()
                model.weight[0, step] = 1
            average.update(step + 1)
        share = average.tensors()["weight"][0].double()
        at = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
        mean = (share * at).sum()
        assert share.sum() == pytest.approx(1, abs=1e-5)
        assert (share * (at - mean) ** 2).sum().sqrt() == pytest.approx(width, rel=0.03)
        # numpy's roots of the paper's cubic: γ³ + 7γ² + (16 − σ⁻²)γ + (12 − σ⁻²)
        gamma = np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max()
        expected = at**gamma / (at**gamma).sum()
        assert (share - expected).abs().sum() < 0.03


def test_the_models_own_weights_come_back_to_the_bit_whatever_happens_meanwhile():
    model = nn.Linear(3, 2)
    average, own = WeightAverage(model, 0.9), model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)

    def interrupted():
        assert torch.equal(model.weight, own)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), average.in_place():
        interrupted()
    assert torch.equal(model.weight, own + 1)
    assert torch.equal(average.tensors()["weight"], own)


def test_buffers_are_not_averaged():
    model = nn.BatchNorm1d(2)
    average = WeightAverage(model, 0.9)
    assert set(average.tensors()) == {"weight", "bias"}
    model.running_mean.fill_(3)
    with average.in_place():
        assert model.running_mean.tolist() == [3, 3]


def evaluated(dataset):
    """An evaluation, and the weights it was given."""
    seen, score = [], held_out(dataset)

    def noted(model):
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return score(model)

    return noted, seen


def test_evaluations_score_the_average_which_is_loaded_unless_the_raw_weights_are_asked_for(tmp_path, dataset):
    noted, seen = evaluated(dataset)
    state = run(tiny_config(ema=0.5), tmp_path / "run", dataset, evaluate=noted)
    plain = run(tiny_config(), tmp_path / "plain", dataset)
    raw = weights(state)
    assert all(torch.equal(p, raw[name]) for name, p in weights(plain).items())  # training does not know of it
    assert any(not torch.equal(p, raw[name]) for name, p in seen[-1].items())
    loaded, _ = swamla.load(tmp_path / "run")
    own, _ = swamla.load(tmp_path / "run", raw=True)
    assert all(torch.equal(p, seen[-1][name]) for name, p in loaded.named_parameters())
    assert all(torch.equal(p, raw[name]) for name, p in own.named_parameters())
    assert held_out(dataset)(loaded)["loss"] == pytest.approx(state.best_loss, abs=1e-6)


def test_a_failed_evaluation_leaves_the_raw_weights(tmp_path, dataset):
    states = []

    def fails(model):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        run(tiny_config(ema=0.5), tmp_path / "run", dataset, evaluate=fails, on_start=states.append)
    plain = run(tiny_config(), tmp_path / "plain", dataset)
    assert all(torch.equal(p, weights(plain)[name]) for name, p in weights(states[0]).items())


def test_an_evaluation_says_that_it_scored_averages(tmp_path, dataset):
    for number, settings in enumerate(({"ema_width": 0.1}, {"ema": 0.5}, {})):
        printed, folder = io.StringIO(), tmp_path / str(number)
        console = Console(file=printed, width=200)
        train(tiny_config(steps=1, **settings), folder, dataset=dataset, evaluate=held_out(dataset), console=console)
        line = next(line for line in printed.getvalue().splitlines() if "Held-out loss" in line)
        assert line.endswith(" | averaged weights") == bool(settings)


@pytest.mark.parametrize(
    ("step", "ema"), [(1, {"ema": 0.7}), (3, {"ema": 0.7}), (5, {"ema": 0.7}), (3, {"ema_width": 0.1})]
)
def test_a_resumed_run_has_the_uninterrupted_ones_average_to_the_bit(tmp_path, monkeypatch, dataset, step, ema):
    config = tiny_config(model_of("gdn", "mla"), eval_interval=2, **ema)
    run(config, tmp_path / "whole", dataset, evaluate=held_out(dataset))
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(Interrupted):
            run(config, tmp_path / "run", dataset, evaluate=held_out(dataset))
    run(config, tmp_path / "run", dataset, evaluate=held_out(dataset), resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")
    assert "ema.safetensors" in digests(tmp_path / "run")


def test_a_skipped_step_does_not_count(tmp_path, monkeypatch, dataset):
    counts = []
    monkeypatch.setattr(WeightAverage, "update", lambda self, count: counts.append(count))
    monkeypatch.setattr(Strategy, "gradient_norm", poisoned_once(2))
    run(tiny_config(ema=0.5, steps=4), tmp_path / "run", dataset)
    assert counts == [1, 2, 3]


def poisoned_once(at):
    """Gradient norms, of which the `at`-th is infinite."""
    real, calls = Strategy.gradient_norm, []

    def norm(strategy):
        calls.append(1)
        return real(strategy) * (float("inf") if len(calls) == at else 1.0)

    return norm


def test_averaged_weights_of_another_model_are_a_corrupt_artefact(tmp_path, dataset):
    run(tiny_config(ema=0.5, steps=1), tmp_path / "run", dataset)
    average = WeightAverage(nn.Linear(2, 2), 0.5)
    with pytest.raises(CorruptError, match="averaged weights do not fit"):
        average.load(latest_checkpoint(tmp_path / "run" / "checkpoints").tensors("ema"), origin="here")


def test_a_checkpoint_that_lost_its_average_is_refused(tmp_path, dataset):
    run(tiny_config(ema=0.5, steps=1), tmp_path / "run", dataset)
    path = next((tmp_path / "run" / "checkpoints").glob("step-*"))
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]["ema.safetensors"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "ema.safetensors").unlink()
    with pytest.raises(CorruptError, match=r"ema\.safetensors: missing"):
        run(tiny_config(ema=0.5, steps=2), tmp_path / "run", dataset, resume=True)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, float("nan")])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ConfigError, match=r"ema = .*must be between 0 and 1, e.g. 0.999"):
        TrainConfig(steps=1, ema=decay)


@pytest.mark.parametrize("settings", [{"ema_width": 0.0}, {"ema_width": 0.3}, {"ema_width": 0.1, "ema": 0.9}])
def test_a_width_that_is_none_or_one_beside_a_decay_is_refused(settings):
    with pytest.raises(ConfigError, match=r"ema_width = .*: (must be above 0|is instead of ema)"):
        TrainConfig(steps=1, **settings)
