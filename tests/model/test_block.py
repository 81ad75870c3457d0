"""The block: what stands before, after and beside a mixer and an FFN, by its equations."""

from typing import Any

import pytest
import torch
from torch import Tensor

from swamla.model.block import Block, BlockConfig
from swamla.model.ffns.none import NoFFNConfig
from swamla.model.norm import RMSNormConfig

from .helpers import MIXERS, WIDTH, assert_close, gradients_of, packed, random_input, scramble

every_mixer = pytest.mark.parametrize("kind", MIXERS)
NORM = RMSNormConfig()


def build_block(config: BlockConfig, dropout: float = 0.0) -> Block:
    """The block at width `WIDTH` with scrambled weights."""
    torch.manual_seed(0)
    block = config.build(WIDTH, NORM, dropout)
    scramble(block)
    return block


def results(block: Block, compute: Any, x_BTD: Tensor) -> dict[str, Tensor]:
    """Output and gradients, by name."""
    block.zero_grad()
    leaf = x_BTD.clone().requires_grad_()
    y_BTD = compute(leaf)
    y_BTD.backward(random_input(*x_BTD.shape[:2], seed=2))
    return {"output": y_BTD.detach(), "input gradient": leaf.grad, **gradients_of(block)}


@every_mixer
def test_a_layer_without_an_ffn_is_its_mixer_alone(kind: str) -> None:
    block = build_block(BlockConfig(mixer=MIXERS[kind], ffn=NoFFNConfig()))
    assert {name.partition(".")[0] for name, _ in block.named_parameters()} == {"mixer_norm", "mixer"}
    x, seq = random_input(1, 12), packed(5, 4, padding=3)
    wanted = results(block, lambda x: x + block.mixer(block.mixer_norm(x), seq), x)
    for checkpointing in ("none", "attention", "ffn", "all"):
        block.checkpointing = checkpointing
        found = results(block, lambda x: block(x, seq)[0], x)
        for name, expected in wanted.items():
            assert_close(found[name], expected, 1e-6, name)
    assert block(x, seq)[1] == {}
