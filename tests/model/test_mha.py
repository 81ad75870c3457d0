"""Multi-head and grouped-query attention, and the models around them, against transformers' GPT-2 and Llama."""

import pytest
import torch

from swamla.model.block import BlockConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.norm import LayerNormConfig, RMSNormConfig
from swamla.model.rope import RopeConfig

from .helpers import Named, assert_equal_to_oracle, random_tokens

BACKENDS = ["reference", "tiles", "sdpa"]
DEPTH = 2


def from_gpt2(theirs: Named) -> Named:
    """GPT-2's names to ours; its `Conv1D` keeps weights transposed."""
    ours = {
        "embedding.weight": theirs["transformer.wte.weight"],
        "positions.weight": theirs["transformer.wpe.weight"],
        "norm.weight": theirs["transformer.ln_f.weight"],
        "norm.bias": theirs["transformer.ln_f.bias"],
    }
    names = {
        "mixer_norm": "ln_1",
        "mixer.qkv_proj": "attn.c_attn",
        "mixer.o_proj": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn.up_proj": "mlp.c_fc",
        "ffn.down_proj": "mlp.c_proj",
    }
    for layer in range(DEPTH):
        for mine, yours in names.items():
            weight = theirs[f"transformer.h.{layer}.{yours}.weight"]
            ours[f"blocks.{layer}.{mine}.weight"] = weight.T if weight.ndim == 2 else weight
            ours[f"blocks.{layer}.{mine}.bias"] = theirs[f"transformer.h.{layer}.{yours}.bias"]
    return ours


def from_llama(theirs: Named) -> Named:
    """Llama's (and Mistral's) names to ours; q, k, v and gate, up are fused."""
    ours = {
        "embedding.weight": theirs["model.embed_tokens.weight"],
        "norm.weight": theirs["model.norm.weight"],
        "head.weight": theirs["lm_head.weight"],
    }
    names = {
        "mixer_norm": ("input_layernorm",),
        "mixer.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mixer.o_proj": ("self_attn.o_proj",),
        "ffn_norm": ("post_attention_layernorm",),
        "ffn.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        "ffn.down_proj": ("mlp.down_proj",),
    }
    for layer in range(DEPTH):
        for mine, yours in names.items():
            parts = [theirs[f"model.layers.{layer}.{part}.weight"] for part in yours]
            ours[f"blocks.{layer}.{mine}.weight"] = torch.cat(parts)
    return ours


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_with_learned_positions_layernorm_gelu_and_biases_is_gpt2(backend: str) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=50,
            n_positions=24,
            n_embd=32,
            n_layer=DEPTH,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="eager",
        )
    )
    block = BlockConfig(
        mixer=MHAConfig(n_heads=4, rope=None, bias=True, backend=backend), ffn=DenseConfig(activation="gelu", bias=True)
    )
    ours = LanguageModelConfig(
        vocab_size=50,
        width=32,
        blocks={"gpt2": block},
        pattern=("gpt2",) * DEPTH,
        norm=LayerNormConfig(),
        learned_positions=24,
    ).build()
    tokens = random_tokens(2, 24, 50)
    assert_equal_to_oracle(ours, theirs, from_gpt2, ours, lambda ids: theirs(ids).logits, tokens)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_a_model_with_grouped_queries_rope_rmsnorm_and_swiglu_is_llama(n_kv_heads: int, backend: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=DEPTH,
            num_attention_heads=4,
            num_key_value_heads=n_kv_heads,
            head_dim=12,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            attn_implementation="eager",
        )
    )
    mixer = MHAConfig(n_heads=4, n_kv_heads=n_kv_heads, head_dim=12, rope=RopeConfig(base=500.0), backend=backend)
    ours = LanguageModelConfig(
        vocab_size=50,
        width=32,
        blocks={"llama": BlockConfig(mixer=mixer, ffn=DenseConfig(hidden=40))},
        pattern=("llama",) * DEPTH,
        norm=RMSNormConfig(eps=1e-5),
        tied_head=False,
    ).build()
    tokens = random_tokens(2, 24, 50)
    assert_equal_to_oracle(ours, theirs, from_llama, ours, lambda ids: theirs(ids).logits, tokens)
