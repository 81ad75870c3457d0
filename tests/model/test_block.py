"""The block: what stands before, after and beside a mixer and an FFN, by its equations."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from swamla.model.accounting import count_parameters, forward_flops, parameter_specs, state_bytes
from swamla.model.block import Block, BlockConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.ffns.none import NoFFNConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.gdn import GDNConfig
from swamla.model.mixers.mha import MHAConfig
from swamla.model.norm import RMSNormConfig
from swamla.ops.layout import Layout

from .helpers import (
    FFNS,
    MIXERS,
    WIDTH,
    Named,
    assert_close,
    assert_equal_to_oracle,
    build_model,
    gradients_of,
    packed,
    random_input,
    random_tokens,
    scramble,
    whole,
)

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


def convolved(h_BTD: Tensor, weight_DW: Tensor, seq: Layout) -> Tensor:
    """x_t + Σ_i w_i ⊙ x_{t−i} token by token, the last tap on the token itself, within its document."""
    taps, rows = weight_DW.shape[1], []
    for h_TD, position_T in zip(h_BTD, seq.position_BT.tolist(), strict=True):
        reach = [min(taps, position + 1) for position in position_T]
        filtered = [sum(weight_DW[:, -1 - i] * h_TD[t - i] for i in range(n)) for t, n in enumerate(reach)]
        rows.append(h_TD + torch.stack(filtered))
    return torch.stack(rows)


def by_its_equation(block: Block, config: BlockConfig, x_BTD: Tensor, seq: Layout) -> Tensor:
    """The block from its mixer, its FFN and its norms."""
    post = config.norm_place == "post"
    h_BTD = x_BTD if post else block.mixer_norm(x_BTD)
    if block.conv is not None:
        h_BTD = convolved(h_BTD, block.conv.weight, seq)
    y_BTD = block.mixer(h_BTD, seq)
    x_BTD = x_BTD + (block.mixer_norm(y_BTD) if post else y_BTD)
    if block.ffn_norm is None:
        return x_BTD
    if post:
        return x_BTD + block.ffn_norm(block.ffn(x_BTD, seq)[0])
    return x_BTD + block.ffn(block.ffn_norm(x_BTD), seq)[0]


VARIANTS: dict[str, dict[str, Any]] = {
    "conv": {"conv": 3},
    "conv of one tap": {"conv": 1},
    "conv, no ffn": {"conv": 4, "ffn": NoFFNConfig()},
    "post": {"norm_place": "post"},
    "post, conv, experts": {"norm_place": "post", "conv": 2, "ffn": FFNS["moe"]},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@every_mixer
@every_variant
def test_a_block_is_its_equation_with_gradients_in_packed_and_padded_rows(kind: str, variant: str) -> None:
    config = BlockConfig(mixer=MIXERS[kind], **VARIANTS[variant])
    block, x, seq = build_block(config), random_input(1, 20), packed(1, 8, 2, 6, padding=3)
    wanted = results(block, lambda x: by_its_equation(block, config, x, seq), x)
    for checkpointing in ("none", "attention", "ffn", "all"):
        block.checkpointing = checkpointing
        found = results(block, lambda x: block(x, seq)[0], x)
        for name, expected in wanted.items():
            assert_close(found[name], expected, 2e-5, name)


@every_mixer
@every_variant
@torch.no_grad()
def test_packed_documents_are_each_alone(kind: str, variant: str) -> None:
    block = build_block(BlockConfig(mixer=MIXERS[kind], **VARIANTS[variant]))
    lengths = (1, 2, 30, 5)
    x = random_input(1, sum(lengths))
    alone = [block(part, whole(part))[0] for part in x.split(lengths, dim=1)]
    assert_close(block(x, packed(*lengths))[0], torch.cat(alone, dim=1), 1e-5)


@every_mixer
@every_variant
@torch.no_grad()
def test_a_block_stepped_through_any_split_is_forward(kind: str, variant: str) -> None:
    block, time = build_block(BlockConfig(mixer=MIXERS[kind], **VARIANTS[variant])), 13
    x = random_input(2, time)
    expected = block(x, whole(x))[0]
    for cuts in (*([cut] for cut in range(1, time)), [1, 2, 3, 6, 7], list(range(1, time))):
        for uniform in (True, False):  # lengths known to be equal, or not
            state, pieces = block.init_state(2, time, dtype=torch.float32, device="cpu"), []
            for begin, end in pairwise([0, *cuts, time]):
                ragged = torch.full((2,), begin), torch.ones(2, end - begin, dtype=torch.bool)
                seq = Layout.continuing_uniform(begin, 2, end - begin) if uniform else Layout.continuing(*ragged)
                pieces.append(block.step(x[:, begin:end], state, seq))
            assert_close(torch.cat(pieces, dim=1), expected, 1e-5, f"cut at {cuts}")


@every_mixer
@every_variant
@torch.no_grad()
def test_padding_changes_no_state_whatever_it_holds(kind: str, variant: str) -> None:
    """Rows of unequal lengths, of which some bring nothing; the padding is NaN."""
    block = build_block(BlockConfig(mixer=MIXERS[kind], **VARIANTS[variant]))
    pieces, lengths = [[2, 0, 5], [1, 1, 1], [0, 4, 1], [3, 1, 6]], [6, 6, 13]
    x, taken, out = random_input(3, 13), [0, 0, 0], [[], [], []]
    state = block.init_state(3, 20, dtype=torch.float32, device="cpu")
    for counts in pieces:
        fed = torch.full((3, max(counts), WIDTH), torch.nan)
        for row, count in enumerate(counts):
            fed[row, :count] = x[row, taken[row] : taken[row] + count]
        valid = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        y = block.step(fed, state, Layout.continuing(torch.tensor(taken), valid))
        for row, count in enumerate(counts):
            out[row].append(y[row, :count])
            taken[row] += count
    assert taken == lengths
    assert all(tensor.isfinite().all() for tensor in state.tensors())
    for row, length in enumerate(lengths):
        alone = x[row : row + 1, :length]
        assert_close(torch.cat(out[row])[None], block(alone, whole(alone))[0], 1e-5, f"row {row}")


@every_mixer
@every_variant
@torch.no_grad()
def test_the_blocks_state_is_mutated_in_place_and_weighs_what_accounting_says(kind: str, variant: str) -> None:
    config = BlockConfig(mixer=MIXERS[kind], **VARIANTS[variant])
    block = build_block(config)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        state = block.init_state(3, 29, dtype=dtype, device="cpu")
        inputs = 3 * max(0, config.conv - 1) * WIDTH * dtype.itemsize
        mixers = 3 * config.mixer.state_bytes(WIDTH, 29, dtype.itemsize)
        assert state.nbytes == inputs + mixers == 3 * config.state_bytes(WIDTH, 29, dtype.itemsize)
        before = [(tensor.data_ptr(), tensor.clone()) for tensor in state.tensors()]
        block.step(random_input(3, 11), state, Layout.continuing_uniform(0, 3, 11))
        for (address, old), new in zip(before, state.tensors(), strict=True):
            assert new.data_ptr() == address
            assert not torch.equal(old, new) or not new.numel()


def model_of(**settings: Any) -> LanguageModelConfig:
    """Every mixer in blocks with these settings."""
    blocks = {kind: BlockConfig(mixer=mixer, **settings) for kind, mixer in MIXERS.items()}
    return LanguageModelConfig(vocab_size=31, width=WIDTH, blocks=blocks, pattern=tuple(blocks))


@every_variant
@torch.no_grad()
def test_a_model_of_such_blocks_steps_as_forward_and_its_counts_are_the_modules(variant: str) -> None:
    config = model_of(**VARIANTS[variant])
    model, tokens = build_model(config).eval(), random_tokens(2, 20)
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters())
    assert model.init_state(2, 20).nbytes == state_bytes(config, 20, batch=2)
    state, expected = model.init_state(2, 20), model(tokens)
    pieces = [model.step(piece, state) for piece in tokens.split((7, 1, 1, 11), dim=1)]
    assert_close(torch.cat(pieces, dim=1), expected, 1e-4)


def test_the_convolution_is_counted_to_the_unit() -> None:
    plain, convolved = model_of(), model_of(conv=4)
    filters = len(MIXERS) * 4 * WIDTH
    assert count_parameters(convolved).by_component == {**count_parameters(plain).by_component, "convolution": filters}
    assert forward_flops(convolved, 50) - forward_flops(plain, 50) == 50 * 2 * filters
    assert state_bytes(convolved, 50) - state_bytes(plain, 50) == len(MIXERS) * 3 * WIDTH * 4


def test_the_filters_are_vectors_and_start_as_torchs_convolutions() -> None:
    config = replace(model_of(conv=4), width=64)
    names = {f"blocks.{layer}.conv.weight" for layer in range(config.depth)}
    assert {spec.name for spec in parameter_specs(config) if spec.name.endswith(".conv.weight")} == names
    assert names <= config.vectors
    filters = torch.cat([block.conv.weight.flatten() for block in config.build(seed=0).blocks])
    assert filters.abs().max() <= 0.5
    assert filters.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.1)


def test_a_convolution_sees_the_order_of_tokens_where_its_mixer_does_not() -> None:
    mixer = MIXERS["latent"]
    assert not BlockConfig(mixer=mixer).sees_order
    assert not BlockConfig(mixer=mixer, conv=1).sees_order
    assert BlockConfig(mixer=mixer, conv=2).sees_order


def fused(named: Named, *names: str) -> Tensor:
    return torch.cat([named[name] for name in names])


def attention_layer(named: Named, theirs: str, ours: str) -> Named:
    """An OLMo 2 layer's weights by our names."""
    found = {
        "mixer.qkv_proj.weight": fused(named, *(f"{theirs}.self_attn.{side}_proj.weight" for side in "qkv")),
        "mixer.o_proj.weight": named[f"{theirs}.self_attn.o_proj.weight"],
        "mixer.q_norm.weight": named[f"{theirs}.self_attn.q_norm.weight"],
        "mixer.k_norm.weight": named[f"{theirs}.self_attn.k_norm.weight"],
        "mixer_norm.weight": named[f"{theirs}.post_attention_layernorm.weight"],
        "ffn_norm.weight": named[f"{theirs}.post_feedforward_layernorm.weight"],
        **swiglu(named, theirs),
    }
    return {f"{ours}.{name}": weight for name, weight in found.items()}


def swiglu(named: Named, theirs: str) -> Named:
    return {
        "ffn.gate_up_proj.weight": fused(named, f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight"),
        "ffn.down_proj.weight": named[f"{theirs}.mlp.down_proj.weight"],
    }


def linear_layer(named: Named, theirs: str, ours: str) -> Named:
    """A gated DeltaNet layer of OLMo Hybrid, which has its norms before mixer and FFN, by our names."""
    inner = f"{theirs}.linear_attn"
    found = {
        "mixer.qkvz_proj.weight": fused(named, *(f"{inner}.{side}_proj.weight" for side in "qkvg")),
        "mixer.ba_proj.weight": fused(named, f"{inner}.b_proj.weight", f"{inner}.a_proj.weight"),
        "mixer.conv_weight": named[f"{inner}.conv1d.weight"].squeeze(1),
        "mixer.A_log": named[f"{inner}.A_log"],
        "mixer.dt_bias": named[f"{inner}.dt_bias"],
        "mixer.norm_weight": named[f"{inner}.o_norm.weight"],
        "mixer.o_proj.weight": named[f"{inner}.o_proj.weight"],
        "mixer_norm.weight": named[f"{theirs}.input_layernorm.weight"],
        "ffn_norm.weight": named[f"{theirs}.post_attention_layernorm.weight"],
        **swiglu(named, theirs),
    }
    return {f"{ours}.{name}": weight for name, weight in found.items()}


def around_the_layers(named: Named) -> Named:
    return {
        "embedding.weight": named["model.embed_tokens.weight"],
        "norm.weight": named["model.norm.weight"],
        "head.weight": named["lm_head.weight"],
    }


def test_a_model_with_its_norms_behind_mixers_and_ffns_is_olmo_2() -> None:
    from transformers import Olmo2Config, Olmo2ForCausalLM

    theirs = Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            attn_implementation="eager",
            pad_token_id=None,
        )
    )
    mixer = MHAConfig(n_heads=4, n_kv_heads=2, qk_norm="whole")
    block = BlockConfig(mixer=mixer, ffn=DenseConfig(hidden=40), norm_place="post")
    config = LanguageModelConfig(vocab_size=50, width=32, blocks={"a": block}, pattern=("a", "a"), tied_head=False)

    def translate(named: Named) -> Named:
        layers = [attention_layer(named, f"model.layers.{n}", f"blocks.{n}") for n in range(2)]
        return around_the_layers(named) | layers[0] | layers[1]

    ours = config.build()
    assert_equal_to_oracle(ours, theirs, translate, ours, lambda ids: theirs(ids).logits, random_tokens(2, 24, 50))


def test_each_block_has_its_own_place_for_norms_as_in_olmo_hybrid() -> None:
    """Its gated DeltaNet layers have them before, its attention layers behind. Eigenvalues are not negative here."""
    from transformers import OlmoHybridConfig, OlmoHybridForCausalLM

    theirs = OlmoHybridForCausalLM(
        OlmoHybridConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=12,
            linear_value_head_dim=10,
            linear_allow_neg_eigval=False,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": None},
            attn_implementation="eager",
            pad_token_id=None,
            eos_token_id=None,
        )
    )
    theirs.model.layers[0].linear_attn.o_norm.variance_epsilon = 1e-6
    ffn = DenseConfig(hidden=40)
    blocks = {
        "gdn": BlockConfig(mixer=GDNConfig(n_heads=2, head_k_dim=12, head_v_dim=10), ffn=ffn),
        "mha": BlockConfig(
            mixer=MHAConfig(n_heads=4, n_kv_heads=2, rope=None, qk_norm="whole"), ffn=ffn, norm_place="post"
        ),
    }
    config = LanguageModelConfig(
        vocab_size=50, width=32, blocks=blocks, pattern=("gdn", "mha"), norm=NORM, tied_head=False
    )

    def translate(named: Named) -> Named:
        layers = linear_layer(named, "model.layers.0", "blocks.0"), attention_layer(named, "model.layers.1", "blocks.1")
        return around_the_layers(named) | layers[0] | layers[1]

    ours = config.build()
    assert_equal_to_oracle(ours, theirs, translate, ours, lambda ids: theirs(ids).logits, random_tokens(2, 70, 50))


@torch.no_grad()
def test_what_is_added_to_the_stream_is_normed_or_comes_from_what_is_normed() -> None:
    """Of a mixer whose output is scaled up: what a block adds stays as it is behind a norm, and grows before one."""
    for place, factor in (("pre", 100.0), ("post", 1.0)):
        block = build_block(BlockConfig(mixer=MIXERS["mha"], ffn=NoFFNConfig(), norm_place=place))
        x = random_input(1, 9)
        added = block(x, whole(x))[0] - x
        block.mixer.o_proj.weight.mul_(100)
        assert_close(block(x, whole(x))[0] - x, factor * added, 1e-4, place)
