"""The block: what stands before, after and beside a mixer and an FFN, by its equations."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from swamla.model.accounting import count_parameters, forward_flops, parameter_specs, state_bytes
from swamla.model.block import Block, BlockConfig
from swamla.model.ffns.none import NoFFNConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.norm import RMSNormConfig
from swamla.ops.layout import Layout

from .helpers import (
    MIXERS,
    WIDTH,
    assert_close,
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
    h_BTD = block.mixer_norm(x_BTD)
    if block.conv is not None:
        h_BTD = convolved(h_BTD, block.conv.weight, seq)
    x_BTD = x_BTD + block.mixer(h_BTD, seq)
    return x_BTD if block.ffn_norm is None else x_BTD + block.ffn(block.ffn_norm(x_BTD), seq)[0]


VARIANTS: dict[str, dict[str, Any]] = {
    "conv": {"conv": 3},
    "conv of one tap": {"conv": 1},
    "conv, no ffn": {"conv": 4, "ffn": NoFFNConfig()},
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
        inputs = 3 * (config.conv - 1) * WIDTH * dtype.itemsize
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
