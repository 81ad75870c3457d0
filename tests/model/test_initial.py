"""Initial weights are a function of the seed, the name and the shape of each parameter."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from swamla.model.language_model import LanguageModel, LanguageModelConfig
from swamla.model.norm import DynamicTanhConfig

from .helpers import FFNS, hybrid_config

CONFIGS = {ffn: hybrid_config(ffn=ffn) for ffn in FFNS}
CONFIGS["untied"] = replace(CONFIGS["dense"], tied_head=False, norm=DynamicTanhConfig(alpha=0.7))


def equal(one: LanguageModel, other: LanguageModel) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_model_filled_part_by_part_in_any_order_is_the_model_filled_at_once(config: LanguageModelConfig) -> None:
    model = config.skeleton().to_empty(device="cpu")
    model.tie()
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    for buffer in model.buffers():
        buffer.fill_(float("nan"))
    parts = [name for name, _ in model.named_children() if name != "blocks"]
    torch.manual_seed(1)
    for part in [*reversed(parts), *(f"blocks.{index}." for index in (2, 0, 3, 1))]:
        model.reset_parameters(7, within=part)
        torch.rand(3)  # whatever else draws in between
    torch.manual_seed(2)
    assert equal(model, config.build(seed=7))


def test_other_layers_and_other_modules_change_no_parameter_that_stays() -> None:
    config = CONFIGS["dense"]
    found = dict(config.build(seed=3).named_parameters())
    other = replace(config, pattern=(*config.pattern, "swa", "gdn"), tied_head=False, learned_positions=9)
    extended = dict(other.build(seed=3).named_parameters())
    scaled = (2 * config.depth) ** 0.5 / (2 * other.depth) ** 0.5
    for name, parameter in found.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.testing.assert_close(extended[name], parameter * scaled)
        else:
            assert torch.equal(extended[name], parameter), name
    drawn = [p.flatten()[:8] for p in extended.values() if p.ndim >= 2 and p.any()]  # tables of n-grams begin at zero
    assert len({tuple(row.tolist()) for row in drawn}) == len(drawn)  # no two parameters start alike


def test_a_given_seed_leaves_the_global_generator_alone_and_none_asks_it() -> None:
    config = CONFIGS["latent_moe"]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    given = config.build(seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    first, second = config.build(), config.build()
    torch.manual_seed(0)
    assert equal(config.build(), first)
    assert not equal(first, second)
    assert not equal(first, given)


def test_a_skeleton_holds_no_numbers() -> None:
    model = CONFIGS["moe"].skeleton()
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert model.head.weight is model.embedding.weight


def test_building_does_not_load_torchs_compiler() -> None:
    code = (
        "import sys; from swamla.model import *;"
        "LanguageModelConfig(vocab_size=9, width=8, blocks={'a': BlockConfig(mixer=MHAConfig(n_heads=2))},"
        "pattern=('a',)).build(seed=0); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
