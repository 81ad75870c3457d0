"""Which architecture equals a model of ours, and which settings of a config.json are read, refused or left out."""

import pytest

from swamla.interop import equal_architecture
from swamla.model.block import BlockConfig
from swamla.model.ffns.moe import MoEConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.gdn import GDNConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.mixers.mla import MLAConfig
from swamla.model.rope import RopeConfig, YarnScaling

SHARPENED = RopeConfig(scaling=YarnScaling(factor=4.0, original_length=128, mscale_all_dim=0.7))
MLA = MLAConfig(n_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)


def model_of(*blocks: BlockConfig) -> LanguageModelConfig:
    named = {str(index): block for index, block in enumerate(blocks)}
    return LanguageModelConfig(vocab_size=96, width=64, blocks=named, pattern=tuple(named))


@pytest.mark.parametrize(
    "blocks",
    [
        pytest.param([BlockConfig(mixer=MHAConfig(n_heads=2, rope=SHARPENED))], id="softmax sharpened by YaRN"),
        pytest.param(
            [BlockConfig(mixer=MLA, ffn=MoEConfig(n_experts=4, groups=4, groups_used=3, group_score="max"))],
            id="groups of one expert",
        ),
        pytest.param(
            [
                BlockConfig(mixer=GDNConfig(n_heads=2)),
                BlockConfig(mixer=MHAConfig(n_heads=2, head_dim=44, rope_dim=30, gate="sigmoid", qk_norm="head")),
            ],
            id="30 of 44 elements rotated, which is no share",
        ),
    ],
)
def test_a_model_that_others_would_refuse_is_written_as_our_own(blocks: list[BlockConfig]) -> None:
    assert equal_architecture(model_of(*blocks)).kind == "swamla"
