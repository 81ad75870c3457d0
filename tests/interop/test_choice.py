"""Which architecture equals a model of ours, and which settings of a config.json are read, refused or left out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from swamla.errors import ConfigError, UsageError
from swamla.interop import Architecture, equal_architecture, save_pretrained
from swamla.interop.architecture import architecture_of
from swamla.model.block import BlockConfig
from swamla.model.ffns.moe import MoEConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.gdn import GDNConfig
from swamla.model.mixers.kda import KDAConfig
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


@pytest.mark.parametrize(
    ("kind", "hub"),
    [
        ("llama", {"rope_theta": 5e5, "rope_scaling": None, "pretraining_tp": 1, "eos_token_id": [1, 2]}),
        ("mistral", {"sliding_window": None, "rope_theta": 1e6, "torch_dtype": "bfloat16"}),
        ("qwen2", {"sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 28, "use_mrope": False}),
        ("qwen3", {"sliding_window": 4096, "use_sliding_window": False, "rope_scaling": None}),
        ("qwen3_next", {"full_attention_interval": 4, "partial_rotary_factor": 0.25, "use_sliding_window": False}),
        (
            "qwen3_5_text",
            {"full_attention_interval": 4, "attn_output_gate": True, "mamba_ssm_dtype": "float32"}
            | {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "mlp_only_layers": []},
        ),
        ("deepseek_v2", {"aux_loss_alpha": 0.001, "seq_aux": True, "ep_size": 1, "moe_layer_freq": 1}),
        ("deepseek_v3", {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "ep_size": 1, "head_dim": 64}),
        ("olmo2", {"attention_bias": False, "pad_token_id": 3, "rope_scaling": None}),
    ],
)
def test_a_setting_that_the_hub_writes_and_that_changes_nothing_is_no_warning(
    kind: str, hub: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    architecture_of(members_of(Architecture)[kind].example().plain() | hub, "config.json")
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize(
    ("kind", "blocks"),
    [
        ("llama", [BlockConfig(mixer=MHAConfig(n_heads=2, rope_dim=32, softmax_scale=32**-0.5))]),
        (
            "kimi_linear",
            [
                BlockConfig(mixer=KDAConfig(n_heads=2, decay_rank=32, norm_eps=1e-6)),
                BlockConfig(mixer=replace(MLA, rope=None)),
            ],
        ),
    ],
)
def test_a_setting_at_the_value_that_it_has_by_default_is_none_that_is_lacking(kind, blocks) -> None:
    assert equal_architecture(model_of(*blocks)).kind == kind


@pytest.mark.parametrize("kind", ["llama", "olmo2", "deepseek_v3"])
def test_positions_without_a_base_are_refused_where_an_architecture_always_has_positions(kind: str) -> None:
    plain = members_of(Architecture)[kind].example().plain() | {"rope_parameters": {"rope_theta": None}}
    with pytest.raises(ConfigError, match=r"rope_parameters\.rope_theta = None: must be a number"):
        architecture_of(plain, "config.json").language_model()


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_moe", "deepseek_v2"])
def test_a_bias_that_balances_experts_is_not_dropped_on_the_way_out(kind: str, tmp_path: Path) -> None:
    config = members_of(Architecture)[kind].example().language_model()
    routers = [block.ffn for block in config.layers if isinstance(block.ffn, MoEConfig)]
    assert routers
    assert all(ffn.bias_rate == 0 for ffn in routers)  # so that training on from an imported one keeps it at 0
    model = config.build(seed=0)
    assert save_pretrained(model, tmp_path / "untrained").kind == kind
    layer = [block.ffn for block in config.layers].index(routers[0])
    model.blocks[layer].ffn.router.bias[1] = -0.003
    with pytest.raises(UsageError, match=rf"router.bias = 'up to 0.003': {kind} does not have it, it must be 0"):
        save_pretrained(model, tmp_path / "out", to=kind)
    assert not (tmp_path / "out").exists()
    assert save_pretrained(model, tmp_path / "own").kind == "swamla"
