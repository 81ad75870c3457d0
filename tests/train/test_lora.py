"""Runs that train adapters alone: the weights and the routers' biases beside them stay as they were."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import swamla
from swamla import distributed
from swamla.checkpoint import find_checkpoint
from swamla.errors import ConfigError
from swamla.hub.staging import WEIGHTS, complete, stage
from swamla.model.ffns.moe import MoEConfig

from .helpers import MODEL, run, tiny_config

BLOCK = replace(next(iter(MODEL.blocks.values())), ffn=MoEConfig(n_experts=4, n_activated=2, expert_hidden=16))
EXPERTS = replace(MODEL, blocks={"a": BLOCK}, pattern=("a", "a"))


def test_nothing_but_adapters_changes_not_even_the_biases_that_balance_experts(dataset, tmp_path: Path) -> None:
    run(tiny_config(EXPERTS, steps=2), tmp_path / "base", dataset)
    before = swamla.load(tmp_path / "base")[0].state_dict()
    config = tiny_config(EXPERTS, steps=3, lora=2, init_from=str(tmp_path / "base"))
    run(config, tmp_path / "run", dataset)
    checkpoint = find_checkpoint(tmp_path / "run", "latest")
    after = checkpoint.tensors("model")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert any(name.endswith("router.bias") and tensor.any() for name, tensor in before.items())
    merged = swamla.load(tmp_path / "run", "latest")[0].state_dict()
    assert not torch.equal(merged["blocks.0.ffn.experts.down"], before["blocks.0.ffn.experts.down"])


def test_what_is_pushed_to_the_hub_is_the_merged_model(dataset, tmp_path: Path) -> None:
    run(tiny_config(EXPERTS, steps=2, lora=2), tmp_path / "run", dataset)
    stage(tmp_path / "run", tmp_path / "staged", "me/first-try")
    complete(tmp_path / "staged")
    pushed = load_file(tmp_path / "staged" / WEIGHTS)
    merged = swamla.load(tmp_path / "run")[0].state_dict()
    assert pushed.keys() <= merged.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in pushed.items())
    assert "blocks.0.ffn.experts.down" in pushed


@pytest.mark.parametrize("changed", [{"parallel": "fsdp"}, {"expert_parallel": 2}])
def test_processes_that_share_a_model_are_refused(
    dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    from swamla.train.run_folder import _attach_adapters

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match=r"train\.lora = 2: must be 0: adapters are trained with the whole model"):
        _attach_adapters(
            replace(EXPERTS, vocab_size=300).build(0), tiny_config(EXPERTS, lora=2, **changed).train, dataset
        )
