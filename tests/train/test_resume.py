"""A run interrupted anywhere and resumed is, to the bit, the run that was never interrupted."""

import json
import os
import random
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from swamla.errors import ConfigError, CorruptError, DataError, Interrupted, UsageError
from swamla.train import loop as loop_module
from swamla.train.state import generator_states, set_generator_states
from swamla.train.tracking.metrics import read_metrics

from .helpers import MIXERS, OPTIMIZERS, held_out, losses, model_of, run, tiny_config, tiny_dataset, weights


def stop_after(monkeypatch, step, number=signal.SIGTERM):
    """Let the process receive a signal in the middle of step `step`."""
    real = loop_module.training_step

    def stopped(state, *args):
        if state.step + 1 == step:
            os.kill(os.getpid(), number)
        return real(state, *args)

    monkeypatch.setattr(loop_module, "training_step", stopped)


def digests(run_dir, step=6):
    """SHA-256 of weights, optimizer state and random generators in the last checkpoint."""
    manifest = json.loads((run_dir / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())
    return {name: file["sha256"] for name, file in manifest["files"].items() if name.endswith(".safetensors")}


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """Uninterrupted runs by optimizer: (losses, weights, samples read, best loss, files of the last checkpoint)."""

    def make(optimizer):
        folder = tmp_path_factory.mktemp("whole") / "run"
        state = run(tiny_config(accumulation=2, optimizer=optimizer), folder, dataset, evaluate=held_out(dataset))
        return losses(folder), weights(state), state.sample, state.best_loss, digests(folder)

    return {kind: make(optimizer) for kind, optimizer in OPTIMIZERS.items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("step", [1, 3, 5])
def test_resumed_losses_samples_and_weights_are_the_uninterrupted_ones(
    tmp_path, monkeypatch, dataset, whole, step, optimizer
):
    config = tiny_config(accumulation=2, optimizer=optimizer)
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(Interrupted) as caught:
            run(config, tmp_path / "run", dataset, evaluate=held_out(dataset))
    assert caught.value.exit_status == 75
    assert losses(tmp_path / "run")[-1][0] == step
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    state = run(config, tmp_path / "run", dataset, evaluate=held_out(dataset), resume=True)
    expected_losses, expected_weights, sample, best, expected_files = whole[optimizer.kind]
    assert losses(tmp_path / "run") == expected_losses
    assert state.sample == sample
    assert state.best_loss == best
    assert all(torch.equal(p, expected_weights[name]) for name, p in weights(state).items())
    assert digests(tmp_path / "run") == expected_files


HYBRID = ("gdn", "swa", "mla", "mha")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("pattern", [*((name,) for name in MIXERS), HYBRID], ids=" ".join)
def test_every_mixer_resumes_to_the_bit_from_an_interruption_at_any_step(
    tmp_path, monkeypatch, dataset, pattern, precision
):
    monkeypatch.setattr(loop_module, "plot_losses", lambda *args, **options: None)  # most of these runs' time
    config = tiny_config(model_of(*pattern), precision=precision, steps=4)
    expected = run(config, tmp_path / "whole", dataset)
    expected_losses = losses(tmp_path / "whole")
    for step in (1, 2, 3):
        folder = tmp_path / str(step)
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(Interrupted):
                run(config, folder, dataset)
        torch.manual_seed(99), random.seed(99), np.random.seed(99)
        state = run(config, folder, dataset, resume=True)
        assert losses(folder) == expected_losses
        assert digests(folder, 4) == digests(tmp_path / "whole", 4)
        assert all(torch.equal(p, weights(expected)[name]) for name, p in weights(state).items())


@pytest.mark.parametrize("step", [2, 6], ids=["in the run", "at its end"])
def test_a_signal_during_an_evaluation_ends_it_at_once_and_nothing_is_lost(tmp_path, dataset, step):
    config = tiny_config(model_of(*HYBRID), eval_interval=step)
    score = held_out(dataset)
    run(config, tmp_path / "whole", dataset, evaluate=score)

    def interrupted(model):
        os.kill(os.getpid(), signal.SIGTERM)
        score(model)
        raise AssertionError("the evaluation goes on")

    with pytest.raises(Interrupted, match=f"stopped by SIGTERM after step {step}") as caught:
        run(config, tmp_path / "run", dataset, evaluate=interrupted)
    assert caught.value.exit_status == 75
    assert [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "held_out_loss" in r] == []
    run(config, tmp_path / "run", dataset, evaluate=score, resume=True)
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")


def timeless(run_dir):
    """All records of a run, training and held-out, without the clock."""
    clock = ("elapsed", "tokens_per_second", "mfu", "peak_memory")
    return [{k: v for k, v in r.items() if k not in clock} for r in read_metrics(run_dir / "metrics.jsonl")]


def test_after_a_crash_the_metrics_are_cut_back_to_the_checkpoint(tmp_path, monkeypatch, dataset, whole):
    config = tiny_config(accumulation=2, save_interval=2)
    real = loop_module.training_step

    def crash(state, *args):
        if state.step == 5:
            raise RuntimeError("power cut")
        return real(state, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "training_step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            run(config, tmp_path / "run", dataset)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo')  # the line that was being written
    assert losses(tmp_path / "run")[-1][0] == 5
    run(config, tmp_path / "run", dataset, resume=True)
    assert losses(tmp_path / "run") == whole["adamw"][0]


def test_a_damaged_newest_checkpoint_is_fallen_back_from_and_set_aside(tmp_path, dataset, whole):
    config = tiny_config(accumulation=2, save_interval=2, keep_last=3)
    run(config, tmp_path / "run", dataset)
    newest = tmp_path / "run" / "checkpoints" / "step-00000006"
    os.truncate(newest / "optimizer.safetensors", 100)
    with pytest.warns(UserWarning, match=r"step-00000006/optimizer\.safetensors"):
        run(config, tmp_path / "run", dataset, resume=True)
    assert losses(tmp_path / "run") == whole["adamw"][0]
    assert (newest.parent / "damaged-step-00000006").is_dir()


def test_a_run_stopped_before_its_first_checkpoint_starts_over(tmp_path, dataset, whole):
    config = tiny_config(accumulation=2)
    run(config, tmp_path / "run", dataset)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.rename(tmp_path / path.name)
    with pytest.warns(UserWarning, match="holds no checkpoint yet"):
        run(config, tmp_path / "run", dataset, resume=True)
    assert losses(tmp_path / "run") == whole["adamw"][0]


def test_a_run_may_be_prolonged(tmp_path, dataset):
    constant = {"schedule": "constant"}  # others have to be told what becomes of their rates
    run(tiny_config(steps=3, **constant), tmp_path / "run", dataset)
    assert run(tiny_config(steps=5, **constant), tmp_path / "run", dataset, resume=True).step == 5
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["steps"] == 5


def test_a_run_older_than_a_setting_counts_as_having_its_default(tmp_path, dataset):
    run(tiny_config(), tmp_path / "run", dataset)
    file = tmp_path / "run" / "config.json"
    plain = json.loads(file.read_text())
    del plain["train"]["seed"]
    file.write_text(json.dumps(plain))
    with pytest.raises(ConfigError, match=r"train.seed = 5: the run to resume had 0"):
        run(tiny_config(seed=5), tmp_path / "run", dataset, resume=True)
    run(tiny_config(), tmp_path / "run", dataset, resume=True)


@pytest.mark.parametrize(("setting", "value"), [("seed", 5), ("batch_size", 8), ("block_size", 16)])
def test_what_would_make_it_another_run_is_refused_by_name(tmp_path, dataset, setting, value):
    run(tiny_config(), tmp_path / "run", dataset)
    with pytest.raises(ConfigError, match=f"train.{setting} = {value}: the run to resume had"):
        run(tiny_config(**{setting: value}), tmp_path / "run", dataset, resume=True)


def test_data_that_changed_since_the_checkpoint_is_refused(tmp_path, dataset):
    run(tiny_config(), tmp_path / "run", dataset)
    rewrite_state(tmp_path / "run", lambda state: state.update(data_fingerprint="f" * 64))
    with pytest.raises(DataError, match="the data changed since the checkpoint"):
        run(tiny_config(), tmp_path / "run", dataset, resume=True)


def test_changed_data_is_said_before_what_follows_from_it(tmp_path, dataset):
    run(tiny_config(), tmp_path / "run", dataset)
    more_characters = tiny_dataset(tmp_path / "other", tokenizer="char")
    settled = json.loads((tmp_path / "run" / "config.json").read_text())["model"]["vocab_size"]
    config = tiny_config(replace(model_of("mha"), vocab_size=settled - 240))  # smaller than either tokenizer's
    with pytest.raises(DataError, match="the data, or its tokenizer, changed since the checkpoint"):
        run(config, tmp_path / "run", more_characters, resume=True)


def rewrite_state(run_dir, edit):
    """Change state.json of the last checkpoint, which the manifest then no longer lists."""
    path = next((run_dir / "checkpoints").glob("step-*"))
    state, manifest = (json.loads((path / name).read_text()) for name in ("state.json", "manifest.json"))
    edit(state)
    del manifest["files"]["state.json"]
    (path / "state.json").write_text(json.dumps(state))
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["sample", "precision", "backends", "data_fingerprint"])
def test_a_state_that_lacks_something_is_a_corrupt_artefact(tmp_path, dataset, name):
    run(tiny_config(), tmp_path / "run", dataset)
    rewrite_state(tmp_path / "run", lambda state: state.pop(name))
    with pytest.raises(CorruptError, match=rf"state\.json: damaged: .*{name}"):
        run(tiny_config(), tmp_path / "run", dataset, resume=True)


def test_other_backends_than_the_runs_are_told(tmp_path, dataset):
    run(tiny_config(), tmp_path / "run", dataset)
    rewrite_state(tmp_path / "run", lambda state: state.update(backends={"attention": "flex"}))
    with pytest.warns(UserWarning, match="backends changed: .*flex.* before, .*torch.* from here on"):
        run(tiny_config(), tmp_path / "run", dataset, resume=True)


def test_a_checkpoint_without_optimizer_state_is_refused(tmp_path, dataset):
    run(tiny_config(), tmp_path / "run", dataset)
    path = next((tmp_path / "run" / "checkpoints").glob("step-*"))
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]["optimizer.safetensors"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "optimizer.safetensors").unlink()
    with pytest.raises(CorruptError, match=r"optimizer\.safetensors: missing"):
        run(tiny_config(), tmp_path / "run", dataset, resume=True)


def test_a_folder_that_is_not_empty_is_refused_without_resume_and_left_as_it_is(tmp_path, dataset):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="is not empty: choose another folder, or continue it with `resume`"):
        run(tiny_config(), tmp_path, dataset)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_there_must_be_a_run_to_resume(tmp_path, dataset):
    with pytest.raises(UsageError, match="nothing to resume"):
        run(tiny_config(), tmp_path / "run", dataset, resume=True)
    assert not (tmp_path / "run").exists()


def test_all_three_random_generators_are_put_back():
    random.gauss(0, 1), np.random.randn(3)  # leaves each with half of a pair in hand
    states = {name: t.clone() for name, t in generator_states().items()}

    def draw():
        return torch.rand(3).tolist(), random.gauss(0, 1), random.random(), np.random.randn(3).tolist()

    first = draw()
    assert draw() != first
    set_generator_states(states)
    assert draw() == first


@pytest.mark.parametrize("resume", [False, True])
def test_no_second_run_trains_in_a_folder_that_one_is_training_in(tmp_path, dataset, resume):
    refused = []

    def second(state):
        with pytest.raises(UsageError) as caught:
            run(tiny_config(), tmp_path / "run", dataset, resume=resume)
        refused.append(str(caught.value))

    run(tiny_config(), tmp_path / "run", dataset, on_start=second)
    assert len(refused) == 1
    assert "another process is training in it" in refused[0]
    assert len(losses(tmp_path / "run")) == 6
    run(tiny_config(), tmp_path / "run", dataset, resume=True)  # the folder is free again


def test_a_best_that_was_evaluated_only_after_it_was_saved_is_still_the_best_after_a_crash(tmp_path, dataset):
    folder, calls = tmp_path / "run", []

    def evaluate(model):
        calls.append(1)
        return {"loss": 1.0 / len(calls)}

    config = tiny_config(steps=4, save_interval=4, eval_interval=None)  # step 4 is saved, then evaluated
    state = run(config, folder, dataset, evaluate=evaluate)
    assert (state.best, state.evaluated_step, len(calls)) == ((4, 1.0), 4, 1)
    saved = json.loads((folder / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert (saved["best_step"], saved["evaluated_step"]) == (None, None)
    resumed = run(config, folder, dataset, evaluate=evaluate, resume=True)
    assert (resumed.best, resumed.evaluated_step, len(calls)) == ((4, 1.0), 4, 1)
    assert json.loads((folder / "checkpoints" / "best.json").read_text()) == {"step": 4, "loss": 1.0}


@pytest.mark.parametrize("said", ['{"step": 5, "loss": 0.1}', '{"step": 4, "loss": 9.0}', '{"step": 4}', "no JSON"])
def test_a_best_json_that_is_worse_or_says_nothing_of_use_gives_way_to_the_state(tmp_path, dataset, said):
    folder = tmp_path / "run"
    config = tiny_config(steps=4, save_interval=2, eval_interval=2)
    best = run(config, folder, dataset, evaluate=held_out(dataset)).best
    (folder / "checkpoints" / "best.json").write_text(said)
    assert run(config, folder, dataset, evaluate=held_out(dataset), resume=True).best == best
