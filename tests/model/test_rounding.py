"""Under autocast a block rounds the input of projections once, which changes no output of theirs."""

import pytest
import torch

from swamla.model import BlockConfig, DenseConfig, LanguageModelConfig, MoEConfig
from swamla.model.mixers.mixer import MixerConfig
from swamla.registry import members_of

WIDTH = 64
PROJECTING = [config for config in members_of(MixerConfig).values() if config.only_projects]


def output_and_gradient(mixer: MixerConfig, *, rounds: bool) -> tuple[torch.Tensor, torch.Tensor]:
    block = BlockConfig(mixer=mixer, ffn=DenseConfig(hidden=96))
    model = LanguageModelConfig(vocab_size=50, width=WIDTH, blocks={"one": block}, pattern=("one",) * 2).build(seed=0)
    for layer in model.blocks:
        layer.rounds = (layer.rounds[0] and rounds, layer.rounds[1] and rounds)
    tokens = torch.arange(80).view(2, 40) % 50
    with torch.autocast("cpu", torch.bfloat16):
        y = model.hidden(tokens)[0]
    y.float().pow(3).sum().backward()
    assert model.embedding.weight.grad is not None
    return y.detach(), model.embedding.weight.grad


@pytest.mark.parametrize("mixer", PROJECTING, ids=lambda config: config.kind)
def test_outputs_are_the_same_to_the_bit_and_gradients_within_rounding(mixer: type[MixerConfig]) -> None:
    once, gradient = output_and_gradient(mixer.example(), rounds=True)
    each, expected = output_and_gradient(mixer.example(), rounds=False)
    assert torch.equal(once, each)
    assert (gradient - expected).norm() <= 1e-2 * expected.norm()


def test_a_router_reads_its_input_in_full_precision() -> None:
    assert len(PROJECTING) >= 4
    assert DenseConfig.only_projects
    assert not MoEConfig.only_projects
