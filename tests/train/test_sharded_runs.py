"""A run goes on with another number of processes, held in another way: the same moment, data and curve."""

import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from swamla import distributed
from swamla.checkpoint import load_checkpoint, step_name
from swamla.errors import Interrupted
from swamla.model.block import BlockConfig
from swamla.model.ffns.latent_moe import LatentMoEConfig
from swamla.train import RunConfig
from swamla.train import loop as loop_module
from swamla.train.run_folder import fresh_state, resolve_vocabulary

from .helpers import MIXERS, held_out, losses, model_of, run, tiny_config, tiny_dataset
from .ranks import on_ranks

STEPS = 6


def config_of(**settings: object) -> RunConfig:
    """Routers with biases, a tied head, an average: everything that a checkpoint can hold."""
    ffn = LatentMoEConfig(n_experts=4, n_activated=2, ratio=2, expert_hidden=8, shared_hidden=8)
    model = replace(
        model_of("swa", "gdn"),
        blocks={"swa": BlockConfig(mixer=MIXERS["swa"], ffn=ffn), "gdn": BlockConfig(mixer=MIXERS["gdn"])},
        dropout=0.0,  # which every rank draws for itself
    )
    return tiny_config(model, ema=0.9, keep_last=9, **settings)


def train_on(folder: Path, data: Path, config: RunConfig, resume: bool, stop_after: int | None) -> None:
    """What a rank does: train, and be stopped by a signal in the middle of a step, where that is asked for."""
    dataset, real = tiny_dataset(data), loop_module.training_step

    def step(state, *args):
        if state.step + 1 == stop_after and distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(state, *args)

    with (
        patch.object(loop_module, "training_step", step),
        patch.object(loop_module, "plot_losses"),
        nullcontext() if stop_after is None else pytest.raises(Interrupted),
    ):
        run(config, folder, dataset, evaluate=held_out(dataset), resume=resume)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The documents, tokenized before several ranks ask for them."""
    folder = tmp_path_factory.mktemp("data")
    tiny_dataset(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train_on(folder, data, config_of(), False, None)
    return folder


def moment(folder: Path, step: int) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors of a checkpoint, whole."""
    checkpoint = load_checkpoint(folder / "checkpoints" / step_name(step))
    return {group: checkpoint.tensors(group) for group in ("model", "optimizer", "ema")}


def assert_close(folder: Path, other: Path, step: int) -> None:
    """In the norm: where a gradient is next to nothing, Adam's update of a weight is as large as its rounding."""
    found, expected = moment(folder, step), moment(other, step)
    for group, tensors in expected.items():
        assert found[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            distance = (found[group][name] - tensor).norm() / tensor.norm().clamp(min=1e-12)
            assert distance < 1e-3, (group, name, distance)


def test_a_run_of_two_processes_goes_on_in_one_and_then_in_four(data, undisturbed, tmp_path) -> None:
    folder = tmp_path / "run"
    on_ranks(2, train_on, folder, data, config_of(parallel="fsdp", async_save=True), False, 2)
    first = folder / "checkpoints" / step_name(2)
    assert len(list((first / "model").iterdir())) == len(list((first / "optimizer").iterdir())) == 2
    assert (first / "rng.safetensors").exists()
    assert_close(folder, undisturbed_at(2, data, tmp_path), 2)
    train_on(folder, data, config_of(), True, 4)
    assert (folder / "checkpoints" / step_name(4) / "model.safetensors").exists()
    on_ranks(4, train_on, folder, data, config_of(parallel="hsdp", shards=2), True, None)
    last = folder / "checkpoints" / step_name(STEPS)
    assert len(list((last / "model").iterdir())) == 2  # of each shard one copy writes
    assert [step for step, _ in losses(folder)] == list(range(1, STEPS + 1))
    for (_, loss), (_, expected) in zip(losses(folder), losses(undisturbed), strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)
    assert_close(folder, undisturbed, STEPS)


def undisturbed_at(step: int, data: Path, tmp_path: Path) -> Path:
    folder = tmp_path / f"to {step}"
    train_on(folder, data, config_of(), False, step)
    return folder


def test_four_processes_take_up_two_processes_moment_to_the_bit(data, tmp_path) -> None:
    folder = tmp_path / "run"
    on_ranks(2, train_on, folder, data, config_of(parallel="fsdp"), False, 1)
    on_ranks(4, save_again, folder, data, tmp_path / "again")
    found, expected = moment(tmp_path / "again", 1), moment(folder, 1)
    for group, tensors in expected.items():
        for name, tensor in tensors.items():
            assert torch.equal(found[group][name], tensor), (group, name)
    assert load_checkpoint(tmp_path / "again/checkpoints" / step_name(1)).state["sample"] == 4


def save_again(folder: Path, data: Path, to: Path) -> None:
    """Take up the newest checkpoint, and write it as these ranks hold it, whatever is in place of the state first."""
    from swamla.checkpoint import Saver, latest_checkpoint
    from swamla.train.run import writer_group

    dataset = tiny_dataset(data)
    state = fresh_state(resolve_vocabulary(config_of(parallel="fsdp"), dataset), dataset)
    with torch.no_grad():
        for p in state.model.parameters():
            distributed.local(p).fill_(float("nan"))
    checkpoint = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    state.restore(checkpoint)
    saver = Saver(to / "checkpoints", keep_last=2, background=True, writers=writer_group())
    saver.save(state.step, tensors=state.tensors(), state=state.plain())
    (saved,) = saver.saved(wait=True)
    assert saved.error is None
