"""Latent attention against its equation written out head by head, and against GPT-2's with the products of its maps."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swamla.model.block import BlockConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.latent import LatentAttention, LatentConfig
from swamla.model.norm import LayerNormConfig
from swamla.ops.layout import Layout

from .helpers import (
    WIDTH,
    assert_close,
    build_mixer,
    build_model,
    gradients_of,
    packed,
    random_input,
    random_tokens,
    whole,
)

BACKENDS = ["reference", "tiles", "sdpa"]
TIME = 21
SHAPES = {
    "half the width": LatentConfig(n_heads=4),
    "half the width, biases": LatentConfig(n_heads=4, bias=True),
    "a narrow latent, biases": LatentConfig(n_heads=4, n_latent=8, bias=True),
    "a latent as wide as the model": LatentConfig(n_heads=2, n_latent=WIDTH),
    "one head": LatentConfig(n_heads=1, n_latent=5, bias=True),
}
every_shape = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)


def mixer_of(config: LatentConfig) -> LatentAttention:
    mixer = build_mixer(config)
    assert isinstance(mixer, LatentAttention)
    return mixer


def written_out(mixer: LatentAttention, x_BTD: Tensor, documents: list[int]) -> Tensor:
    """c = W_c x, q = W_q x, k = W_k c, v = W_v c; softmax(q kᵀ / √(n_latent / H)) v, head by head, then W_o."""
    heads, rank = mixer.config.n_heads, mixer.latent_dim
    bias = {name: p for name, p in mixer.named_parameters() if name.endswith("bias")}

    def linear(x: Tensor, name: str, rows: slice) -> Tensor:
        y = torch.einsum("btd,ed->bte", x, mixer.get_parameter(f"{name}.weight")[rows])
        return y + bias[f"{name}.bias"][rows] if bias else y

    q, latent = linear(x_BTD, "qc_proj", slice(0, rank)), linear(x_BTD, "qc_proj", slice(rank, None))
    k, v = linear(latent, "kv_proj", slice(0, rank)), linear(latent, "kv_proj", slice(rank, None))
    document = torch.tensor(documents)
    hidden = torch.ones(len(documents), len(documents)).triu(1).bool() | (document[:, None] != document)
    out = []
    for head in range(heads):
        own, its = slice(head * rank // heads, (head + 1) * rank // heads), WIDTH // heads
        score = torch.einsum("btk,bsk->bts", q[..., own], k[..., own]) / math.sqrt(rank / heads)
        weight = score.masked_fill(hidden, -math.inf).softmax(-1)
        out.append(torch.einsum("bts,bsv->btv", weight, v[..., head * its : (head + 1) * its]))
    return linear(torch.cat(out, dim=-1), "o_proj", slice(None))


@pytest.mark.parametrize("backend", BACKENDS)
@every_shape
def test_the_layer_is_its_equations_in_outputs_and_gradients(config: LatentConfig, backend: str) -> None:
    from dataclasses import replace

    mixer, x = mixer_of(replace(config, backend=backend)), random_input(2, TIME)
    documents = [0] * 9 + [1] * 12
    seq = Layout.from_documents(torch.tensor([documents] * 2))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    found, expected = mixer(inputs[0], seq), written_out(mixer, inputs[1], documents)
    assert expected.abs().max() > 0.1
    assert_close(found, expected, 1e-5, "output")
    upstream = random_input(2, TIME, seed=2)
    found.backward(upstream)
    mine = {name: gradient.clone() for name, gradient in gradients_of(mixer).items()}
    mixer.zero_grad()
    expected.backward(upstream)
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    assert_close(inputs[0].grad, inputs[1].grad, 1e-4, "input gradient")
    for name, gradient in gradients_of(mixer).items():
        assert_close(mine[name], gradient, 1e-4, f"gradient of {name}")


@every_shape
@torch.no_grad()
def test_the_layer_is_pytorchs_attention_of_the_expanded_heads(config: LatentConfig) -> None:
    """PyTorch's own kernel on keys padded with zeros to one width with the values, at the scale of the unpadded."""
    mixer, x = mixer_of(config), random_input(2, TIME)
    latent = F.linear(x, mixer.qc_proj.weight, mixer.qc_proj.bias)[..., mixer.latent_dim :]
    q = F.linear(x, mixer.qc_proj.weight, mixer.qc_proj.bias)[..., : mixer.latent_dim]
    kv = F.linear(latent, mixer.kv_proj.weight, mixer.kv_proj.bias)
    parts = (q, kv[..., : mixer.latent_dim], kv[..., mixer.latent_dim :])
    q, k, v = (part.unflatten(-1, (config.n_heads, -1)).transpose(1, 2) for part in parts)
    missing = v.shape[-1] - k.shape[-1]
    scale = k.shape[-1] ** -0.5
    o = F.scaled_dot_product_attention(F.pad(q, (0, missing)), F.pad(k, (0, missing)), v, is_causal=True, scale=scale)
    expected = F.linear(o.transpose(1, 2).flatten(2), mixer.o_proj.weight, mixer.o_proj.bias)
    assert_close(mixer(x, whole(x)), expected, 1e-5)


@torch.no_grad()
def test_with_a_latent_as_wide_as_the_model_it_is_gpt2s_attention_with_the_products_of_the_maps() -> None:
    """Only then are a head's keys as wide as its values, as GPT-2's are."""
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

    mixer, x = mixer_of(LatentConfig(n_heads=4, n_latent=WIDTH, bias=True)), random_input(2, TIME)
    theirs = GPT2Attention(GPT2Config(n_embd=WIDTH, n_head=4, attn_implementation="eager"), layer_idx=0).eval()
    queries, down = mixer.qc_proj.weight.chunk(2)
    query_bias, latent_bias = mixer.qc_proj.bias.chunk(2)
    theirs.c_attn.weight.copy_(torch.cat((queries, mixer.kv_proj.weight @ down)).T)
    theirs.c_attn.bias.copy_(torch.cat((query_bias, mixer.kv_proj.weight @ latent_bias + mixer.kv_proj.bias)))
    theirs.c_proj.weight.copy_(mixer.o_proj.weight.T)
    theirs.c_proj.bias.copy_(mixer.o_proj.bias)
    mask = torch.full((TIME, TIME), float("-inf")).triu(1)[None, None]
    assert_close(mixer(x, whole(x)), theirs(x, attention_mask=mask)[0], 1e-5)


@every_shape
@torch.no_grad()
def test_the_absorbed_step_is_the_unabsorbed_forward(config: LatentConfig) -> None:
    mixer, x = mixer_of(config), random_input(2, TIME)
    state = mixer.init_state(2, TIME, dtype=torch.float32, device="cpu")
    seq = Layout.continuing(torch.zeros(2, dtype=torch.int64), torch.ones(2, TIME, dtype=torch.bool))
    assert_close(mixer.step(x, state, seq), mixer(x, whole(x)), 1e-5)


@torch.no_grad()
def test_a_step_never_expands_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = mixer_of(LatentConfig(n_heads=4, bias=True)), random_input(1, 5)
    expected = mixer(x, whole(x))

    def expand(_: Tensor) -> None:
        raise AssertionError("expanded")

    monkeypatch.setattr(mixer, "expand", expand)
    state = mixer.init_state(1, 5, dtype=torch.float32, device="cpu")
    seq = Layout.continuing(torch.zeros(1, dtype=torch.int64), torch.ones(1, 5, dtype=torch.bool))
    assert_close(mixer.step(x, state, seq), expected, 1e-5)
    with pytest.raises(AssertionError, match="expanded"):
        mixer(x, whole(x))


def test_the_state_holds_the_latent_and_nothing_else() -> None:
    mixer, x = mixer_of(LatentConfig(n_heads=4, n_latent=12, bias=True)), random_input(1, 5)
    state = mixer.init_state(1, 5, dtype=torch.float32, device="cpu")
    seq = Layout.continuing(torch.zeros(1, dtype=torch.int64), torch.ones(1, 5, dtype=torch.bool))
    mixer.step(x, state, seq)
    assert_close(state.latent_BSR, mixer.project(x, whole(x))[1], 1e-6)
    assert state.nbytes == 5 * 12 * 4
    assert state.tensors() == [state.latent_BSR]


@torch.no_grad()
def test_a_keys_bias_changes_nothing_and_a_values_bias_adds_one_vector() -> None:
    mixer, x = mixer_of(LatentConfig(n_heads=4, bias=True)), random_input(1, TIME)
    before = mixer(x, whole(x))
    mixer.kv_proj.bias[: mixer.latent_dim] += 3.0
    assert_close(mixer(x, whole(x)), before, 1e-5)
    mixer.kv_proj.bias[mixer.latent_dim :] += 1.0
    assert_close(mixer(x, whole(x)) - before, mixer.o_proj.weight.sum(dim=1).expand(1, TIME, -1), 1e-5)


@torch.no_grad()
def test_the_layer_itself_knows_no_position() -> None:
    """The last token's output is the same for any order of those before it."""
    mixer, x = mixer_of(LatentConfig(n_heads=4)), random_input(1, TIME)
    order = torch.cat((torch.randperm(TIME - 1, generator=torch.Generator().manual_seed(0)), torch.tensor([TIME - 1])))
    assert_close(mixer(x[:, order], whole(x))[:, -1], mixer(x, whole(x))[:, -1], 1e-5)


def test_its_counts_are_those_of_its_arithmetic() -> None:
    """D = 32, R = 16: queries and latent 32 · 32, keys 16 · 16, values 16 · 32, output 32 · 32."""
    weights = 32 * 32 + 16 * 16 + 16 * 32 + 32 * 32
    assert LatentConfig(n_heads=4).n_parameters(WIDTH) == weights
    assert LatentConfig(n_heads=4, bias=True).n_parameters(WIDTH) == weights + 32 + 16 + 32 + 32
    assert LatentConfig(n_heads=4).state_bytes(WIDTH, 100, 2) == 100 * 16 * 2
    assert LatentConfig(n_heads=4).forward_flops(WIDTH, 10) == 2 * weights * 10 + 2 * (16 + 32) * 55


def test_it_drops_into_a_gpt2_block_which_trains_and_steps() -> None:
    block = BlockConfig(mixer=LatentConfig(n_heads=4, bias=True), ffn=DenseConfig(activation="gelu", bias=True))
    config = LanguageModelConfig(
        vocab_size=31,
        width=WIDTH,
        blocks={"latent": block},
        pattern=("latent",) * 2,
        norm=LayerNormConfig(),
        learned_positions=40,
    )
    model, tokens = build_model(config), random_tokens(2, 40)
    seq = Layout.from_documents(packed(13, 27).document_BT.expand(2, -1).contiguous())
    model.loss(tokens, tokens.roll(-1, dims=1), seq)[0].backward()
    for name, gradient in gradients_of(model).items():
        assert gradient.abs().max() > 0 or name.endswith("kv_proj.bias"), name
    state, model = model.init_state(2, 40), model.eval()
    with torch.no_grad():
        pieces = [model.step(part, state) for part in tokens.split((7, 1, 32), dim=1)]
        assert_close(torch.cat(pieces, dim=1), model(tokens), 1e-4)
