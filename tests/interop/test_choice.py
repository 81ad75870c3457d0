"""Which architecture equals a model of ours, and which settings of a config.json are read, refused or left out."""

from dataclasses import replace

import pytest

from swamla.errors import ConfigError, UsageError
from swamla.interop import Architecture, equal_architecture
from swamla.interop.architecture import architecture_of
from swamla.model.block import BlockConfig
from swamla.model.ffns.moe import MoEConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.gdn import GDNConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.mixers.mla import MLAConfig
from swamla.model.rope import RopeConfig, YarnScaling
from swamla.registry import members_of

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


def test_deepseek_v2_never_normalises_the_weights_of_experts() -> None:
    ffn = MoEConfig(n_experts=4, n_activated=2, score="softmax", group_score="max", normalise=False)
    config = model_of(BlockConfig(mixer=replace(MLA, rope=RopeConfig(layout="interleaved")), ffn=ffn))
    assert equal_architecture(config, "deepseek_v2").language_model().layers[0].ffn.normalise is False
    normalised = model_of(replace(config.layers[0], ffn=replace(ffn, normalise=True)))
    with pytest.raises(UsageError, match=r"normalise = True: deepseek_v2 does not have it, it must be False"):
        equal_architecture(normalised, "deepseek_v2")
    assert equal_architecture(normalised).kind == "swamla"
    plain = members_of(Architecture)["deepseek_v2"].example().plain()
    with pytest.raises(ConfigError, match="norm_topk_prob = True"):
        architecture_of(plain | {"norm_topk_prob": True}, "config.json")
