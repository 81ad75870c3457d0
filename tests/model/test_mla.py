"""Multi-head latent attention against transformers' DeepSeek-V2 and DeepSeek-V3, weights mapped one to one by name."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swamla.model.mixers.mla import MLAConfig
from swamla.model.rope import RopeConfig, YarnScaling

from .helpers import WIDTH, Named, assert_close, assert_equal_to_oracle, build_mixer, random_input, whole
from .test_mha import BACKENDS

TIME = 21
YARN = {
    "none": None,
    "yarn": YarnScaling(factor=4.0, original_length=512),
    "mscale_all_dim": YarnScaling(factor=4.0, original_length=512, mscale=1.0, mscale_all_dim=1.0),
    "mscale differs": YarnScaling(
        factor=40.0, original_length=64, mscale=0.707, mscale_all_dim=1.3, beta_fast=8.0, beta_slow=2.0
    ),
}


def their_rope(scaling: YarnScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default", "rope_theta": 10000.0}
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_length,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "mscale": scaling.mscale,
        "mscale_all_dim": scaling.mscale_all_dim,
    }


def their_config(version: str, q_lora_rank: int, scaling: YarnScaling | None, **more: Any) -> Any:
    from transformers import DeepseekV2Config, DeepseekV3Config

    return {"v2": DeepseekV2Config, "v3": DeepseekV3Config}[version](
        hidden_size=WIDTH,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=20,
        q_lora_rank=q_lora_rank or None,
        qk_nope_head_dim=8,
        qk_rope_head_dim=16,
        v_head_dim=12,
        max_position_embeddings=512,
        rope_parameters=their_rope(scaling),
        attn_implementation="eager",
        **more,
    )


def our_config(q_lora_rank: int, layout: Any, scaling: YarnScaling | None, backend: str) -> MLAConfig:
    return MLAConfig(
        n_heads=4,
        kv_lora_rank=20,
        q_lora_rank=q_lora_rank,
        qk_nope_head_dim=8,
        qk_rope_head_dim=16,
        v_head_dim=12,
        rope=RopeConfig(layout=layout, scaling=scaling),
        backend=backend,
    )


def same_names(theirs: Named) -> Named:
    return theirs


def causal_bias(time: int) -> Tensor:
    return torch.full((time, time), float("-inf")).triu(1)[None, None]


def assert_is_deepseek(config: MLAConfig, attention: nn.Module, position_embeddings: Any) -> None:
    ours = config.build(WIDTH)
    x = random_input(2, TIME)

    def run_theirs(x_BTD: Tensor) -> Tensor:
        return attention(
            hidden_states=x_BTD, position_embeddings=position_embeddings, attention_mask=causal_bias(TIME)
        )[0]

    assert_equal_to_oracle(ours, attention, same_names, lambda x_BTD: ours(x_BTD, whole(x_BTD)), run_theirs, x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaling", YARN.values(), ids=YARN)
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("q_lora_rank", [0, 24])
def test_mla_is_deepseek_v3s_attention(
    q_lora_rank: int, layout: str, scaling: YarnScaling | None, backend: str
) -> None:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    config = their_config("v3", q_lora_rank, scaling, rope_interleave=layout == "interleaved")
    tables = deepseek.DeepseekV3RotaryEmbedding(config)(torch.zeros(1), torch.arange(TIME)[None])
    attention = deepseek.DeepseekV3Attention(config, layer_idx=0)
    assert_is_deepseek(our_config(q_lora_rank, layout, scaling, backend), attention, tables)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("q_lora_rank", [0, 24])
def test_mla_without_rope_is_kimi_linears_attention(q_lora_rank: int, backend: str) -> None:
    from transformers import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearAttention

    config = KimiLinearConfig(
        hidden_size=WIDTH,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=20,
        q_lora_rank=q_lora_rank or None,
        qk_nope_head_dim=8,
        qk_rope_head_dim=16,
        v_head_dim=12,
        attn_implementation="eager",
    )
    ours = replace(our_config(q_lora_rank, "half", None, backend), rope=None).build(WIDTH)
    theirs = KimiLinearAttention(config, layer_idx=0)
    x, mask = random_input(2, TIME), causal_bias(TIME)
    assert_equal_to_oracle(
        ours, theirs, same_names, lambda x: ours(x, whole(x)), lambda x: theirs(x, attention_mask=mask)[0], x
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaling", [YARN["none"], YARN["mscale_all_dim"]], ids=["plain", "YaRN"])
def test_mla_with_a_gate_for_each_head_is_ling_3s_attention(scaling: YarnScaling | None, backend: str) -> None:
    from transformers import BailingHybridConfig
    from transformers.models.bailing_hybrid import modeling_bailing_hybrid as bailing

    config = BailingHybridConfig(
        hidden_size=WIDTH,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=20,
        qk_nope_head_dim=8,
        qk_rope_head_dim=16,
        v_head_dim=12,
        rope_parameters=their_rope(scaling),
        attn_implementation="eager",
    )
    tables = bailing.BailingHybridRotaryEmbedding(config)(torch.zeros(1), torch.arange(TIME)[None])
    attention = bailing.BailingHybridAttention(config, layer_idx=0)
    assert_is_deepseek(replace(our_config(0, "interleaved", scaling, backend), gate="head"), attention, tables)


def test_mla_without_rope_does_not_see_the_order_of_earlier_tokens() -> None:
    mixer = build_mixer(replace(our_config(0, "half", None, "auto"), rope=None))
    x = random_input(1, TIME)
    shuffled = torch.cat((x[:, :-1].flip(1), x[:, -1:]), dim=1)
    assert_close(mixer(shuffled, whole(x))[:, -1], mixer(x, whole(x))[:, -1], 1e-5)
    turning = build_mixer(our_config(0, "half", None, "auto"))
    assert (turning(shuffled, whole(x)) - turning(x, whole(x)))[:, -1].abs().max() > 1e-3


@pytest.mark.parametrize("q_lora_rank", [0, 24])
def test_the_norms_of_the_latents_have_the_eps_that_is_given(q_lora_rank: int) -> None:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    config = their_config("v3", q_lora_rank, None)
    tables = deepseek.DeepseekV3RotaryEmbedding(config)(torch.zeros(1), torch.arange(TIME)[None])
    attention: Any = deepseek.DeepseekV3Attention(config, layer_idx=0)
    for norm in (attention.kv_a_layernorm, *([attention.q_a_layernorm] if q_lora_rank else [])):
        norm.variance_epsilon = 0.1
    assert_is_deepseek(replace(our_config(q_lora_rank, "interleaved", None, "auto"), norm_eps=0.1), attention, tables)


@pytest.mark.parametrize("scaling", YARN.values(), ids=YARN)
@pytest.mark.parametrize("q_lora_rank", [0, 24])
def test_mla_is_deepseek_v2s_attention(q_lora_rank: int, scaling: YarnScaling | None) -> None:
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek

    config = their_config("v2", q_lora_rank, scaling, head_dim=16)
    tables = deepseek.DeepseekV2RotaryEmbedding(config)(torch.zeros(1), torch.arange(TIME)[None])
    attention = deepseek.DeepseekV2Attention(config, layer_idx=0)
    assert_is_deepseek(our_config(q_lora_rank, "interleaved", scaling, "auto"), attention, tables)


@pytest.mark.parametrize("scaling", YARN.values(), ids=YARN)
@pytest.mark.parametrize("q_lora_rank", [0, 24])
def test_the_absorbed_step_is_the_unabsorbed_forward(q_lora_rank: int, scaling: YarnScaling | None) -> None:
    from swamla.ops.layout import Layout

    mixer = build_mixer(our_config(q_lora_rank, "interleaved", scaling, "auto"))
    x = random_input(2, TIME)
    state = mixer.init_state(2, TIME, dtype=torch.float32, device="cpu")
    seq = Layout.continuing(torch.zeros(2, dtype=torch.int64), torch.ones(2, TIME, dtype=torch.bool))
    assert_close(mixer.step(x, state, seq), mixer(x, whole(x)), 1e-5)


def test_the_state_holds_the_normalised_latent_and_the_rotated_key_and_nothing_else() -> None:
    from swamla.ops.layout import Layout

    mixer = build_mixer(our_config(0, "half", None, "auto"))
    x = random_input(1, 5)
    state = mixer.init_state(1, 5, dtype=torch.float32, device="cpu")
    mixer.step(x, state, Layout.continuing(torch.zeros(1, dtype=torch.int64), torch.ones(1, 5, dtype=torch.bool)))
    _, _, latent, k_rope = mixer.project(x, whole(x))
    assert_close(state.latent_BSR, torch.cat((latent, k_rope.squeeze(2)), dim=-1), 1e-6)
    assert state.nbytes == 5 * (20 + 16) * 4
