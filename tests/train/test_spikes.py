"""Losses out of the ordinary: back to the last checkpoint, on behind the rows since, once and for all."""

import json
import signal
from dataclasses import replace

import pytest

from swamla.checkpoint import load_checkpoint
from swamla.errors import CorruptError, Interrupted
from swamla.train import loop as loop_module
from swamla.train.loop import Diverged
from swamla.train.state import ENOUGH, MEMORY, UsualLoss
from swamla.train.tracking.metrics import read_metrics

from .helpers import losses, run, tiny_config, weights
from .test_resume import stop_after

STEPS = {"steps": 30, "save_interval": 5, "keep_last": 100, "ema": 0.9, "spike_factor": 1.5}


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr(loop_module, "plot_losses", lambda *args, **options: None)


def spoil(monkeypatch, sample, factor=3.0):
    """Let the batch that begins at row `sample` have a loss that is `factor` times as large."""
    real = loop_module.training_step

    def spoiled(state, *args):
        begins = state.sample
        result = real(state, *args)
        return replace(result, loss=factor * result.loss) if begins in sample else result

    monkeypatch.setattr(loop_module, "training_step", spoiled)


def test_the_usual_loss_is_the_mean_at_first_and_forgets_slowly():
    usual = UsualLoss()
    for number in range(1, MEMORY + 1):
        usual.note(float(number))
    assert usual.mean == pytest.approx((MEMORY + 1) / 2)
    for _ in range(10 * MEMORY):
        usual.note(7.0)
    assert usual.mean == pytest.approx(7.0, abs=0.01)


def test_nothing_is_unusual_before_enough_is_known():
    usual = UsualLoss()
    for _ in range(ENOUGH):
        assert not usual.exceeds(1e9, 2.0)
        usual.note(1.0)
    assert usual.exceeds(2.1, 2.0)
    assert not usual.exceeds(1.9, 2.0)


def test_the_usual_loss_comes_back_to_the_bit_and_damage_is_named():
    usual = UsualLoss(mean=1 / 3, count=7)
    assert UsualLoss.of(json.loads(json.dumps(usual.plain()))) == usual
    with pytest.raises(CorruptError, match="the usual loss is 5"):
        UsualLoss.of(5)


def test_after_a_spike_the_weights_are_the_last_checkpoints_and_its_rows_are_left_behind(
    tmp_path, monkeypatch, dataset
):
    spoil(monkeypatch, {26 * 4})
    config = tiny_config(**STEPS)
    run(config, tmp_path / "run", dataset)
    saved = {n: load_checkpoint(tmp_path / "run" / "checkpoints" / f"step-{n:08d}") for n in (25, 27)}
    for group in ("model", "optimizer", "ema"):
        before, after = (saved[n].tensors(group) for n in (25, 27))
        assert all(bool((after[name] == tensor).all()) for name, tensor in before.items())
    assert [saved[n].state["sample"] for n in (25, 27)] == [25 * 4, 27 * 4]
    assert [saved[n].state["skipped"] for n in (25, 27)] == [0, 2]
    assert saved[27].state["tokens"] == saved[25].state["tokens"]
    (told,) = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "spike" in r]
    assert (told["step"], told["rolled_back_to"], told["rows"]) == (27, 25, {"first": 100, "last": 107})
    assert [step for step, _ in losses(tmp_path / "run")] == [n for n in range(1, 31) if n != 27]


@pytest.mark.parametrize("step", [26, 27, 28], ids=["before", "in", "after"])
def test_a_resumed_run_takes_the_same_decision(tmp_path, monkeypatch, dataset, step):
    spoil(monkeypatch, {26 * 4})
    config = tiny_config(**STEPS)
    expected = run(config, tmp_path / "whole", dataset)
    with monkeypatch.context() as patch:
        stop_after(patch, step, signal.SIGTERM)
        with pytest.raises(Interrupted):
            run(config, tmp_path / "run", dataset)
    found = run(config, tmp_path / "run", dataset, resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert (found.sample, found.skipped, found.usual) == (expected.sample, expected.skipped, expected.usual)
    theirs = weights(expected)
    assert all(bool((tensor == theirs[name]).all()) for name, tensor in weights(found).items())


def test_a_run_that_was_stopped_several_times_goes_back_as_one_that_was_not(tmp_path, monkeypatch, dataset):
    """Each stop saves; what the run goes back to is kept however many there are."""
    config = tiny_config(steps=27, spike_factor=1.5, save_interval=10, keep_last=2)
    spoil(monkeypatch, {24 * config.train.batch_size})
    whole = run(config, tmp_path / "whole", dataset)
    for step in (21, 22, 23):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(Interrupted):
                run(config, tmp_path / "cut", dataset, resume=step > 21)
    resumed = run(config, tmp_path / "cut", dataset, resume=True)
    for name in ("whole", "cut"):
        records = read_metrics(tmp_path / name / "metrics.jsonl")
        assert [record["rolled_back_to"] for record in records if "rolled_back_to" in record] == [20], name
    theirs = weights(whole)
    assert all(bool((tensor == theirs[name]).all()) for name, tensor in weights(resumed).items())


def test_without_the_setting_nothing_is_a_spike(tmp_path, monkeypatch, dataset):
    spoil(monkeypatch, {26 * 4})
    assert run(tiny_config(**STEPS | {"spike_factor": None}), tmp_path / "run", dataset).skipped == 0


def test_a_spike_before_the_first_checkpoint_is_recorded_and_the_run_goes_on(tmp_path, monkeypatch, dataset):
    spoil(monkeypatch, {26 * 4})
    state = run(tiny_config(**STEPS | {"save_interval": None}, max_skipped=2), tmp_path / "run", dataset)
    assert (state.step, state.skipped, state.skipped_in_a_row) == (30, 0, 0)
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, 31))


def test_a_loss_that_stays_up_before_the_first_checkpoint_ends_the_run_too(tmp_path, monkeypatch, dataset):
    spoil(monkeypatch, range(26 * 4, 1000))
    with pytest.raises(Diverged, match=r"3 steps in a row, up to step 29, had a loss spike; there is no checkpoint"):
        run(tiny_config(**STEPS | {"save_interval": None}, max_skipped=3), tmp_path / "run", dataset)
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, 30))


def test_a_loss_that_stays_up_ends_the_run_after_as_many_steps_as_allowed(tmp_path, monkeypatch, dataset):
    spoil(monkeypatch, range(26 * 4, 1000))
    with pytest.raises(Diverged, match=r"3 steps in a row, up to step 29, had a loss spike; .*step-00000028"):
        run(tiny_config(**STEPS, max_skipped=3), tmp_path / "run", dataset)
