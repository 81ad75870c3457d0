"""Routers are watched: figures for every step and layer, one warning for every expert that dies."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from swamla.data.dataset import Dataset
from swamla.data.packing import PackedRows
from swamla.model.ffns.moe import MoEConfig
from swamla.model.language_model import LanguageModel
from swamla.train import TrainState, train, training_step
from swamla.train.router_health import DEAD_AFTER, RouterHealth
from swamla.train.run_folder import fresh_state, resolve_vocabulary
from swamla.train.step import StepResult
from swamla.train.tracking.metrics import read_metrics

from .helpers import MODEL, run, tiny_config, weights

EXPERTS = MoEConfig(n_experts=4, n_activated=2, expert_hidden=8)
BLOCK = replace(MODEL.blocks["mha"], ffn=EXPERTS)
ROUTED = replace(MODEL, blocks={"dense": MODEL.blocks["mha"], "experts": BLOCK}, pattern=("dense", "experts"))
FIGURES = {"load_max_over_mean", "idle_experts", "dead_experts", "entropy", "bias_range"}


def model() -> LanguageModel:
    torch.manual_seed(0)
    return replace(ROUTED, vocab_size=40).build()


def summed(*load: int) -> dict[str, torch.Tensor]:
    """What a step's statistics are when the experts of layer 1 had this load."""
    return {"load/1": torch.tensor(load), "entropy/1": torch.tensor(6.0), "tokens/1": torch.tensor(sum(load) // 2)}


def test_figures_are_of_the_layers_with_a_router_only() -> None:
    watched = model()
    watched.blocks[1].ffn.router.bias.copy_(torch.tensor([0.5, -0.25, 0.0, 0.0]))
    figures, warnings = RouterHealth().watch(watched, summed(6, 0, 4, 2))
    assert figures == {
        "router/1/load_max_over_mean": 2.0,
        "router/1/idle_experts": 1,
        "router/1/dead_experts": 0,
        "router/1/entropy": 1.0,
        "router/1/bias_range": 0.75,
    }
    assert warnings == []
    assert RouterHealth().watch(watched, {}) == ({}, [])


def test_a_death_is_told_once_and_again_only_after_a_revival() -> None:
    watched, health = model(), RouterHealth(dead_after=3)
    told = []
    for step in range(1, 13):
        load = (4, 2, 1, 1) if step == 6 else (5, 3, 0, 0) if step > 2 else (4, 3, 1, 0)
        figures, warnings = health.watch(watched, summed(*load))
        told += [(step, warning) for warning in warnings]
        assert figures["router/1/dead_experts"] == {3: 1, 4: 1, 5: 2, 9: 2, 10: 2, 11: 2, 12: 2}.get(step, 0)
    assert [step for step, _ in told] == [3, 5, 9]
    assert "layer 1: 1 of 4 experts died, no token for 3 steps (1 are dead now)" in told[0][1]
    assert "layer 1: 1 of 4 experts died, no token for 3 steps (2 are dead now)" in told[1][1]
    assert "layer 1: 2 of 4 experts died, no token for 3 steps (2 are dead now)" in told[2][1]
    assert all("bias_rate" in warning and "\n" not in warning for _, warning in told)


def collapse(state: TrainState) -> None:
    """A bias that no score outweighs: experts 2 and 3 never get a token."""
    state.model.blocks[1].ffn.router.bias.copy_(torch.tensor([5.0, 5.0, 0.0, 0.0]))


def trained(folder: Path, dataset: Dataset, bias_rate: float, **options: object) -> list[str]:
    """Console lines of a run of a few more steps than it takes to die."""
    blocks = {**ROUTED.blocks, "experts": replace(BLOCK, ffn=replace(EXPERTS, bias_rate=bias_rate))}
    config = tiny_config(replace(ROUTED, blocks=blocks), steps=DEAD_AFTER + 5, batch_size=2)
    out = io.StringIO()
    train(config, folder, dataset=dataset, console=Console(file=out, width=500), **options)
    return out.getvalue().splitlines()


def test_a_run_with_a_biased_router_warns_once_and_its_metrics_tell_by_layer(tmp_path: Path, dataset: Dataset) -> None:
    lines = trained(tmp_path / "run", dataset, bias_rate=0.0, on_start=collapse)
    warnings = [line for line in lines if "warning" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"warning: layer 1: 2 of 4 experts died, no token for {DEAD_AFTER} steps")
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    for record in records:
        assert {key for key in record if key.startswith("router/")} == {f"router/1/{name}" for name in FIGURES}
        assert record["router/1/load_max_over_mean"] == 2.0
        assert record["router/1/idle_experts"] == 2
        assert record["router/1/dead_experts"] == (2 if record["step"] >= DEAD_AFTER else 0)
        assert record["router/1/bias_range"] == 5.0
        assert 0 < record["router/1/entropy"] <= 1.387
    assert json.dumps(records[-1])


def test_a_bias_that_moves_fast_enough_brings_them_back_before_they_die(tmp_path: Path, dataset: Dataset) -> None:
    lines = trained(tmp_path / "run", dataset, bias_rate=0.25, on_start=collapse)
    assert not [line for line in lines if "warning" in line]
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert records[0]["router/1/idle_experts"] == 2
    assert records[-1]["router/1/bias_range"] < 5


def first_step(dataset: Dataset, ffn: MoEConfig, **settings: object) -> tuple[StepResult, LanguageModel]:
    """A step at learning rate 0: what it found, and the model with its gradients."""
    routed = replace(ROUTED, blocks={**ROUTED.blocks, "experts": replace(BLOCK, ffn=ffn)}, dropout=0.0)
    config = resolve_vocabulary(tiny_config(routed, grad_clip=None, **settings), dataset)
    state = fresh_state(config, dataset)
    rows = PackedRows(dataset.train, config.train.block_size, config.train.seed, dataset.tokenizer.eos_id)
    return training_step(state, rows.batch(0, config.train.batch_size), config.train, lr=0.0), state.model


@pytest.mark.parametrize("ffn", [EXPERTS, replace(EXPERTS, aux_loss=0.1, z_loss=0.01)], ids=["plain", "losses"])
def test_accumulation_changes_neither_gradients_nor_balance(dataset: Dataset, ffn: MoEConfig) -> None:
    (one, whole), (four, parts) = (first_step(dataset, ffn, accumulation=count) for count in (1, 4))
    assert one.statistics.keys() == four.statistics.keys()
    assert torch.equal(one.statistics["load/1"], four.statistics["load/1"])
    assert one.statistics["load/1"].sum() == 2 * 4 * 32
    assert torch.equal(whole.blocks[1].ffn.router.bias, parts.blocks[1].ffn.router.bias)
    assert whole.blocks[1].ffn.router.bias.abs().max() > 0
    if ffn.aux_loss:
        assert one.statistics["loss/1"].item() == pytest.approx(four.statistics["loss/1"].item(), rel=1e-5)
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-7, rtol=1e-4, msg=name)


def test_the_auxiliary_losses_reach_the_gradient_of_the_router_and_not_the_loss_that_is_told(dataset: Dataset) -> None:
    (plain, without), (told, pushed) = (first_step(dataset, replace(EXPERTS, aux_loss=weight)) for weight in (0, 10.0))
    assert told.loss == plain.loss
    before, after = (model.blocks[1].ffn.router.weight.grad for model in (without, pushed))
    assert (after - before).norm() > 3 * before.norm()


def test_a_resumed_run_goes_on_with_the_balance_it_had(tmp_path: Path, dataset: Dataset) -> None:
    steady = {"schedule": "constant", "warmup": 0.0}  # so that three steps of six are three steps of three
    whole = run(tiny_config(ROUTED, steps=6, **steady), tmp_path / "whole", dataset)
    run(tiny_config(ROUTED, steps=3, **steady), tmp_path / "parts", dataset)
    parts = run(tiny_config(ROUTED, steps=6, **steady), tmp_path / "parts", dataset, resume=True)
    bias = whole.model.blocks[1].ffn.router.bias
    assert bias.abs().max() > 0
    assert torch.equal(bias, parts.model.blocks[1].ffn.router.bias)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(parts)[name]), name
