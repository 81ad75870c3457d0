"""Multi-head and grouped-query attention, and the models around them, against transformers' GPT-2 and Llama."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swamla.model.block import BlockConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.model.norm import LayerNormConfig, RMSNormConfig
from swamla.model.rope import RopeConfig

from .helpers import Named, assert_close, assert_equal_to_oracle, build_mixer, feed, random_input, random_tokens, whole

BACKENDS = ["reference", "tiles", "sdpa"]
DEPTH = 2
TIME = 20


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


def from_qwen3(theirs: Named) -> Named:
    """Qwen3's names to ours: Llama's, and gains of the norms of queries and keys."""
    norms = {
        f"blocks.{layer}.mixer.{side}_norm.weight": theirs[f"model.layers.{layer}.self_attn.{side}_norm.weight"]
        for layer in range(DEPTH)
        for side in ("q", "k")
    }
    return from_llama(theirs) | norms


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_that_normalises_queries_and_keys_of_each_head_is_qwen3(backend: str, eps: float) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=DEPTH,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            rms_norm_eps=eps,
            attn_implementation="eager",
        )
    )
    mixer = MHAConfig(n_heads=4, n_kv_heads=2, head_dim=12, qk_norm="head", norm_eps=eps, backend=backend)
    ours = LanguageModelConfig(
        vocab_size=50,
        width=32,
        blocks={"qwen3": BlockConfig(mixer=mixer, ffn=DenseConfig(hidden=40))},
        pattern=("qwen3",) * DEPTH,
        norm=RMSNormConfig(eps=eps),
        tied_head=False,
    ).build()
    tokens = random_tokens(2, 24, 50)
    assert_equal_to_oracle(ours, theirs, from_qwen3, ours, lambda ids: theirs(ids).logits, tokens)


@dataclass
class Oracle:
    """transformers' attention: its module, its rotary tables, and our names of its tensors."""

    attention: nn.Module
    tables: tuple[Tensor, Tensor]
    renamed: dict[str, str] = field(default_factory=dict)
    zero_centred: tuple[str, ...] = ()

    def translate(self, named: Named) -> Named:
        """q, k and v are fused."""
        fused = {
            f"qkv_proj.{kind}": torch.cat([named.pop(f"{side}_proj.{kind}") for side in "qkv"])
            for kind in ("weight", "bias")
            if f"q_proj.{kind}" in named
        }
        return fused | {self.renamed.get(name, name): tensor for name, tensor in named.items()}

    def call(self, x_BTD: Tensor, mask: Tensor) -> Tensor:
        return self.attention(x_BTD, self.tables, attention_mask=mask)[0]

    def assert_is(self, ours: nn.Module, time: int = TIME, window: int = TIME) -> None:
        """Values and gradients under a causal mask, perhaps of a window."""
        t, s = torch.arange(time)[:, None], torch.arange(time)
        hidden = (s > t) | (t - s >= window)
        mask = torch.zeros(time, time).masked_fill(hidden, float("-inf"))[None, None]
        assert_equal_to_oracle(
            ours,
            self.attention,
            self.translate,
            lambda x: ours(x, whole(x)),
            lambda x: self.call(x, mask),
            random_input(2, time),
            zero_centred=self.zero_centred,
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_softmax_scale_of_its_own_is_granites_attention_multiplier(backend: str) -> None:
    from transformers import GraniteConfig
    from transformers.models.granite.modeling_granite import GraniteAttention, GraniteRotaryEmbedding

    config = GraniteConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_multiplier=0.7,
        attn_implementation="eager",
    )
    tables = GraniteRotaryEmbedding(config)(torch.zeros(1), torch.arange(TIME)[None])
    ours = MHAConfig(n_heads=4, n_kv_heads=2, softmax_scale=0.7, backend=backend)
    Oracle(GraniteAttention(config, layer_idx=0), tables).assert_is(ours.build(32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 1, 7])
def test_a_learned_sink_is_gpt_osss_attention(window: int | None, backend: str) -> None:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

    config = GptOssConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        attention_bias=True,
        sliding_window=window,
        num_hidden_layers=1,
        layer_types=["full_attention" if window is None else "sliding_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="eager",
    )
    heads: dict[str, Any] = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 10, "bias": True, "backend": backend}
    ours = MHAConfig(**heads, sink_logit=True)
    if window is not None:
        ours = SWAConfig(**heads, window=window, sinks=0, sink_logit=True)
    tables = GptOssRotaryEmbedding(config)(torch.zeros(1), torch.arange(TIME)[None])
    attention = GptOssAttention(config, layer_idx=0)
    torch.nn.init.zeros_(attention.sinks)  # the class leaves what was in memory
    theirs = Oracle(attention, tables, renamed={"sinks": "sink_logit"})
    theirs.assert_is(ours.build(32), window=window or TIME)


class Qwen3Next(Oracle):
    """Its q_proj makes each head's query and gate, it rotates a head's first elements, our gains are its plus one."""

    def translate(self, named: Named) -> Named:
        q, gate = named["q_proj.weight"].unflatten(0, (4, 2, 12)).unbind(1)
        k, v = (named[f"{side}_proj.weight"].unflatten(0, (2, 12)) for side in "kv")
        q, k = (x.roll(-QWEN_ROPE, dims=1) for x in (q, k))
        norms = {f"{side}_norm.weight": named[f"{side}_norm.weight"].roll(-QWEN_ROPE) for side in "qk"}
        qkv = torch.cat([x.flatten(0, 1) for x in (q, k, v, gate)])
        return {"qkv_proj.weight": qkv, "o_proj.weight": named["o_proj.weight"], **norms}


QWEN_ROPE = 6


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gate_and_heads_that_turn_in_part_are_qwen3_nexts_attention(backend: str, eps: float) -> None:
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention, Qwen3NextRotaryEmbedding

    config = Qwen3NextConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        rms_norm_eps=eps,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        attn_implementation="eager",
    )
    ours = MHAConfig(
        n_heads=4,
        n_kv_heads=2,
        head_dim=12,
        rope=RopeConfig(base=500.0),
        rope_dim=QWEN_ROPE,
        gate="sigmoid",
        qk_norm="head",
        norm_eps=eps,
        backend=backend,
    )
    tables = Qwen3NextRotaryEmbedding(config)(torch.zeros(1), torch.arange(TIME)[None])
    norms = ("q_norm.weight", "k_norm.weight")
    Qwen3Next(Qwen3NextAttention(config, layer_idx=0), tables, zero_centred=norms).assert_is(ours.build(32))


class GPTNeoX(Oracle):
    """Its one projection makes each head's query, key and value."""

    def call(self, x_BTD: Tensor, mask: Tensor) -> Tensor:
        return self.attention(x_BTD, mask, position_embeddings=self.tables)[0]

    def translate(self, named: Named) -> Named:
        ours = {}
        for kind in ("weight", "bias"):
            q, k, v = named[f"query_key_value.{kind}"].unflatten(0, (4, 3, 8)).unbind(1)
            ours[f"qkv_proj.{kind}"] = torch.cat([x.flatten(0, 1) for x in (q.roll(-2, 1), k.roll(-2, 1), v)])
            ours[f"o_proj.{kind}"] = named[f"dense.{kind}"]
        return ours


def test_heads_that_turn_in_part_are_gpt_neoxs_attention() -> None:
    from transformers import GPTNeoXConfig
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, GPTNeoXRotaryEmbedding

    config = GPTNeoXConfig(
        hidden_size=32,
        num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        attn_implementation="eager",
    )
    tables = GPTNeoXRotaryEmbedding(config)(torch.zeros(1), torch.arange(TIME)[None])
    ours = MHAConfig(n_heads=4, rope_dim=2, bias=True)
    GPTNeoX(GPTNeoXAttention(config, layer_idx=0), tables).assert_is(ours.build(32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shut_gate_lets_nothing_through_and_an_open_one_everything(backend: str) -> None:
    plain = build_mixer(MHAConfig(n_heads=4, bias=True, backend=backend))
    gated = build_mixer(MHAConfig(n_heads=4, bias=True, gate="sigmoid", backend=backend))
    x = random_input(2, TIME)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            gated.get_parameter(name)[: len(parameter)] = parameter
        gated.qkv_proj.weight[3 * 32 :] = 0
        for gate, expected in ((100.0, plain(x, whole(x))), (-100.0, plain.o_proj.bias.expand_as(x))):
            gated.qkv_proj.bias[3 * 32 :] = gate
            assert_close(gated(x, whole(x)), expected, 1e-6)


def test_normalising_all_heads_together_is_olmo2s_attention() -> None:
    from transformers import Olmo2Config
    from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention, Olmo2RotaryEmbedding

    config = Olmo2Config(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="eager",
    )
    theirs, ours = Olmo2Attention(config, layer_idx=0), MHAConfig(n_heads=4, n_kv_heads=2, qk_norm="whole").build(32)
    x = random_input(2, 20)
    tables = Olmo2RotaryEmbedding(config)(x, torch.arange(20)[None].expand(2, 20))
    causal = torch.full((20, 20), float("-inf")).triu(1)[None, None]

    def translate(named: Named) -> Named:
        qkv = torch.cat([named[f"{side}_proj.weight"] for side in "qkv"])
        others = ("o_proj.weight", "q_norm.weight", "k_norm.weight")
        return {"qkv_proj.weight": qkv, **{name: named[name] for name in others}}

    assert_equal_to_oracle(
        ours, theirs, translate, lambda x: ours(x, whole(x)), lambda x: theirs(x, tables, attention_mask=causal)[0], x
    )


def test_an_ffn_of_squared_relus_is_nemotrons() -> None:
    from transformers import NemotronConfig
    from transformers.models.nemotron.modeling_nemotron import NemotronMLP

    theirs = NemotronMLP(NemotronConfig(hidden_size=32, intermediate_size=48, hidden_act="relu2", mlp_bias=True))
    ours = DenseConfig(hidden=48, activation="relu2", bias=True).build(32)
    x = random_input(2, 7)
    assert_equal_to_oracle(ours, theirs, lambda named: named, lambda x: feed(ours, x)[0], theirs, x)
    assert DenseConfig(activation="relu2").hidden_dim(32) == 128
