"""Saving in the background and saves that fail: the curve is the same, nothing is lost, nothing is silent."""

import errno
import io
import json
import threading
from pathlib import Path

import pytest
import torch
from rich.console import Console

from swamla.checkpoint import Saver, best_step, latest_checkpoint, list_checkpoints, load_checkpoint, step_name, step_of
from swamla.checkpoint import saver as saver_module
from swamla.errors import SwamlaError
from swamla.train import loop as loop_module
from swamla.train import train
from swamla.train.optim import AdamWConfig, MuonConfig

from .helpers import held_out, losses, model_of, run, tiny_config, weights


def files_of(run_dir: Path) -> dict[str, dict[str, str]]:
    """SHA-256 of the tensors in every checkpoint that is there."""
    found = {}
    for path in list_checkpoints(run_dir / "checkpoints"):
        files = json.loads((path / "manifest.json").read_text())["files"]
        found[path.name] = {name: file["sha256"] for name, file in files.items() if name.endswith(".safetensors")}
    return found


@pytest.mark.parametrize("optimizer", [AdamWConfig(), AdamWConfig(moments="8bit"), MuonConfig()])
def test_saved_in_the_background_every_number_and_every_file_is_the_same(tmp_path, dataset, optimizer):
    settings = {"save_interval": 1, "keep_last": 9, "eval_interval": 2, "ema": 0.9, "optimizer": optimizer}
    states = {}
    for background in (False, True):
        config = tiny_config(model_of("gdn", "swa"), async_save=background, **settings)
        states[background] = run(config, tmp_path / str(background), dataset, evaluate=held_out(dataset))
    assert losses(tmp_path / "True") == losses(tmp_path / "False")
    assert files_of(tmp_path / "True") == files_of(tmp_path / "False")
    assert len(files_of(tmp_path / "True")) == 6
    assert states[True].best == states[False].best
    assert best_step(tmp_path / "True" / "checkpoints") == states[True].best_step


class Slow:
    """Writing that goes on only when it is let."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.begun, self.under_way, self.most = threading.Event(), threading.Event(), 0, 0
        real = saver_module.save_checkpoint

        def slow(*args, **options):
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            self.begun.set()
            assert self.go.wait(10)
            self.under_way -= 1
            return real(*args, **options)

        monkeypatch.setattr(saver_module, "save_checkpoint", slow)


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    w = torch.full((100,), value)
    return {"model": {"w": w, "tied": w}, "rng": {"s": torch.tensor(3)}}


def test_what_is_saved_is_the_moment_of_the_call_whatever_happens_to_the_weights_then(tmp_path, monkeypatch):
    slow, live = Slow(monkeypatch), tensors(1.0)
    with Saver(tmp_path, keep_last=2, background=True) as saver:
        saver.save(1, tensors=live, state={})
        assert slow.begun.wait(10)
        live["model"]["w"].fill_(2)
        assert saver.saved() == []
        slow.go.set()
        (saved,) = saver.saved(wait=True)
        saver.save(2, tensors=live, state={})  # into the memory of the first
    assert saved.error is None
    first, second = (load_checkpoint(tmp_path / step_name(step)).tensors("model") for step in (1, 2))
    assert first["w"].unique().tolist() == [1]
    assert second["w"].unique().tolist() == [2]
    assert first["w"] is first["tied"]


def test_one_save_is_under_way_at_most_and_the_end_waits_for_it(tmp_path, monkeypatch):
    slow = Slow(monkeypatch)
    threading.Timer(0.3, slow.go.set).start()
    with Saver(tmp_path, keep_last=9, background=True) as saver:
        for step in (1, 2, 3):
            saver.save(step, tensors=tensors(step), state={})
    assert slow.most == 1
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [1, 2, 3]


def test_best_json_names_a_checkpoint_only_once_it_is_in_place(tmp_path, monkeypatch):
    slow = Slow(monkeypatch)
    with Saver(tmp_path, keep_last=2, background=True) as saver:
        saver.save(1, tensors=tensors(1), state={}, best_loss=2.0)
        assert slow.begun.wait(10)
        assert best_step(tmp_path) is None
        slow.go.set()
        assert [(saved.step, saved.best) for saved in saver.saved(wait=True)] == [(1, True)]
        assert best_step(tmp_path) == 1


def test_the_best_is_kept_until_another_best_is_in_place(tmp_path):
    saver = Saver(tmp_path, keep_last=1, best=None)
    for step, best_loss in [(1, 3.0), (2, None), (3, None), (4, 2.0), (5, None)]:
        saver.save(step, tensors=tensors(step), state={}, best_loss=best_loss)
        kept = [step_of(path) for path in list_checkpoints(tmp_path)]
        assert kept == {1: [1], 2: [1, 2], 3: [1, 3], 4: [4], 5: [4, 5]}[step]


def no_space(monkeypatch, *failing: int, error: Exception | None = None) -> list[int]:
    """Saves of these steps find the disk full; returns the list of those that were tried."""
    real, tried = saver_module.save_checkpoint, []

    def full(directory, step, **options):
        tried.append(step)
        if step in failing:
            raise error or SwamlaError(f"{directory}/step-{step}: disk full: needs 9 bytes, 0 are free")
        return real(directory, step, **options)

    monkeypatch.setattr(saver_module, "save_checkpoint", full)
    return tried


def saves_are_done() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("save-"):
            thread.join()


@pytest.mark.parametrize("background", [False, True])
def test_a_save_that_fails_stops_the_run_at_the_next_step_and_older_ones_are_whole(
    tmp_path, monkeypatch, dataset, background
):
    no_space(monkeypatch, 4)
    real = loop_module.training_step

    def step(*args):
        saves_are_done()
        return real(*args)

    monkeypatch.setattr(loop_module, "training_step", step)
    config = tiny_config(save_interval=2, async_save=background)
    with pytest.raises(SwamlaError, match="step-4: disk full: needs 9 bytes"):
        run(config, tmp_path / "run", dataset)
    found = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert found.step == 2
    assert losses(tmp_path / "run")[-1][0] <= 5  # at the step after the save, if not before


@pytest.mark.parametrize("background", [False, True])
def test_told_to_continue_the_run_warns_and_saves_at_the_next_interval(tmp_path, monkeypatch, dataset, background):
    no_space(monkeypatch, 2, error=OSError(errno.EIO, "the disk is gone"))
    shown, config = io.StringIO(), tiny_config(save_interval=2, async_save=background, on_save_error="continue")
    train(config, tmp_path / "run", dataset=dataset, console=Console(file=shown, width=200))
    assert [step_of(path) for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == [4, 6]
    assert shown.getvalue().count("warning: the checkpoint of step 2 was not saved: [Errno 5] the disk is gone") == 1


@pytest.mark.parametrize("background", [False, True])
def test_the_last_save_of_a_run_is_tried_again_and_its_failure_is_an_error_in_any_case(
    tmp_path, monkeypatch, dataset, background
):
    tried = no_space(monkeypatch, 6)
    config = tiny_config(save_interval=2, async_save=background, on_save_error="continue")
    with pytest.raises(SwamlaError, match="step-6: disk full"):
        run(config, tmp_path / "run", dataset)
    assert tried[:3] == [2, 4, 6]
    monkeypatch.undo()
    monkeypatch.setenv("SWAMLA_CACHE", str(tmp_path / "cache"))
    run(config, tmp_path / "run", dataset, resume=True)
    run(tiny_config(), tmp_path / "whole", dataset)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize("background", [False, True])
def test_a_best_that_could_not_be_saved_is_not_the_best(tmp_path, monkeypatch, dataset, background):
    no_space(monkeypatch, 4)
    scores = iter([3.0, 2.0, 2.5])
    config = tiny_config(eval_interval=2, keep_last=2, async_save=background, on_save_error="continue")

    def evaluate(model):
        saves_are_done()
        return {"loss": next(scores)}

    state = run(config, tmp_path / "run", dataset, evaluate=evaluate)
    assert state.best == (6, 2.5)
    assert best_step(tmp_path / "run" / "checkpoints") == 6
    assert [step_of(path) for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == [2, 6]


@pytest.mark.parametrize("background", [False, True])
def test_a_mistake_of_ours_is_never_gone_on_from(tmp_path, monkeypatch, dataset, background):
    no_space(monkeypatch, 2, error=TypeError("not JSON"))
    with pytest.raises(TypeError, match="not JSON"):
        run(tiny_config(save_interval=2, async_save=background, on_save_error="continue"), tmp_path / "run", dataset)


def test_a_run_resumed_from_background_saves_is_the_uninterrupted_one(tmp_path, monkeypatch, dataset):
    expected = run(tiny_config(), tmp_path / "whole", dataset)
    config = tiny_config(save_interval=2, async_save=True)
    tried = no_space(monkeypatch, 6)
    with pytest.raises(SwamlaError):
        run(config, tmp_path / "run", dataset)
    assert tried[-1] == 6
    monkeypatch.undo()
    monkeypatch.setenv("SWAMLA_CACHE", str(tmp_path / "cache"))
    state = run(config, tmp_path / "run", dataset, resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert all(torch.equal(p, weights(expected)[name]) for name, p in weights(state).items())


@pytest.mark.parametrize("losses_found", [[3.0], [3.0, 4.0]], ids=["best", "worse"])
def test_the_last_step_is_saved_before_its_evaluation_which_a_resumed_run_does_not_repeat(
    tmp_path, dataset, losses_found
):
    folder, seen = tmp_path / "run" / "checkpoints", []

    def evaluate(model):
        last = latest_checkpoint(folder)
        seen.append(None if last is None else last.step)
        return {"loss": losses_found[len(seen) - 1]}

    config = tiny_config(steps=3, save_interval=None, eval_interval=2 if len(losses_found) > 1 else None)
    best = run(config, tmp_path / "run", dataset, evaluate=evaluate).best
    assert (seen[-1], len(seen)) == (3, len(losses_found))
    resumed = run(config, tmp_path / "run", dataset, evaluate=evaluate, resume=True)
    assert (resumed.best, resumed.evaluated_step, len(seen)) == (best, 3, len(losses_found))
    assert best_step(folder) == (2 if len(losses_found) > 1 else 3)
