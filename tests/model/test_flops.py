"""Floating-point operations to the unit, from the equations, product by product."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from swamla.model.accounting import TrainingFlops, forward_flops, training_flops_per_token
from swamla.model.block import BlockConfig, FFNConfig
from swamla.model.ffns.dense import DenseConfig
from swamla.model.ffns.latent_moe import LatentMoEConfig
from swamla.model.ffns.moe import MoEConfig
from swamla.model.ffns.none import NoFFNConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.model.mixers.gdn import GDNConfig
from swamla.model.mixers.kda import KDAConfig
from swamla.model.norm import DynamicTanhConfig, LayerNormConfig, RMSNormConfig
from swamla.ops.layout import PADDING
from tests.toys import TOYS

from .helpers import FFNS, MIXERS, WIDTH, hybrid_config

C = 64  # tokens of a chunk of the delta rule, as its documentation says


def product(rows: int, inner: int, columns: int) -> int:
    """Multiplications and additions of (rows × inner) · (inner × columns)."""
    return rows * columns * (inner + inner)


def solve(rows: int, columns: int) -> int:
    """Of a triangular system with so many right-hand sides: a multiplication and an addition for half a square."""
    return rows * rows * columns


def delta_rule(tokens: int, key: int, value: int) -> int:
    """One head's, by NUMERICS' chunked form: (I + A)[U | W] = …, u = U − W S, o = … q S + (QKᵀ ⊙ D) u, S ← S + Kᵀ u."""
    total = 0
    while tokens > 0:
        c = min(C, tokens)
        total += product(c, key, c)  # K Kᵀ
        total += product(c, key, c)  # Q Kᵀ
        total += solve(c, value) + solve(c, key)  # U and W
        total += product(c, key, value)  # W S
        total += product(c, key, value)  # Q S
        total += product(c, c, value)  # (Q Kᵀ ⊙ D) u
        total += product(key, c, value)  # Kᵀ u
        tokens -= c
    return total


# config, and what its fields mean at the width 24: value heads, key heads, key width, value width
RULES = [
    (GDNConfig(n_heads=2), (2, 2, 12, 12)),
    (GDNConfig(n_heads=4, n_key_heads=2, head_k_dim=8, head_v_dim=6), (4, 2, 8, 6)),
    (GDNConfig(n_heads=6, n_key_heads=3, head_k_dim=4, head_v_dim=20, conv=2), (6, 3, 4, 20)),
    (GDNConfig(n_heads=4, n_key_heads=2, head_k_dim=8, head_v_dim=6, share_qk=True), (4, 2, 8, 6)),
    (GDNConfig(n_heads=4, n_key_heads=2, head_k_dim=8, head_v_dim=6, latent_dim=5), (4, 2, 8, 6)),
    (GDNConfig(n_heads=4, head_k_dim=8, head_v_dim=6, latent_dim=10, share_qk=True), (4, 4, 8, 6)),
    (GDNConfig(n_heads=4, n_key_heads=2, head_k_dim=8, head_v_dim=6, gate="lowrank"), (4, 2, 8, 6)),
    (GDNConfig(n_heads=2, gate="sigmoid", decay="safe", beta_max=2.0), (2, 2, 12, 12)),
]


@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 128, 200, 1000])
@pytest.mark.parametrize(("config", "dims"), RULES, ids=str)
def test_gated_deltanet(config: GDNConfig, dims: tuple[int, int, int, int], length: int) -> None:
    width, (heads, key_heads, key, value) = 24, dims
    keys, values = key_heads * key, heads * value
    convolved = [keys, values] if config.share_qk else [keys, keys, values]
    expected = sum(product(1, config.conv, 1) * channels for channels in convolved) * length
    for into, out in [*((width, channels) for channels in convolved), (values, width)]:
        inner = config.latent_dim
        expected += product(length, into, inner) + product(length, inner, out) if inner else product(length, into, out)
    if config.gate == "lowrank":  # the gate z
        expected += product(length, width, value) + product(length, value, values)
    else:
        expected += product(length, width, values)
    expected += 2 * product(length, width, heads)  # α and β
    expected += heads * delta_rule(length, key, value)
    assert config.forward_flops(width, length) == expected


@pytest.mark.parametrize("length", [1, 64, 65, 200])
@pytest.mark.parametrize(
    ("config", "decays", "gate"),
    [
        (KDAConfig(n_heads=4, n_key_heads=2, head_k_dim=8, head_v_dim=6), [(24, 6), (6, 32)], [(24, 6), (6, 24)]),
        (
            KDAConfig(n_heads=4, n_key_heads=2, head_k_dim=8, head_v_dim=6, decay_rank=5, gate="sigmoid"),
            [(24, 5), (5, 32)],
            [(24, 24)],
        ),
        (
            KDAConfig(n_heads=4, n_key_heads=2, head_k_dim=8, head_v_dim=6, decay_rank=0, gate="silu"),
            [(24, 32)],
            [(24, 24)],
        ),
    ],
    ids=["low ranks", "another rank", "full rank"],
)
def test_kimi_delta_attention(
    config: KDAConfig, decays: list[tuple[int, int]], gate: list[tuple[int, int]], length: int
) -> None:
    """The rule costs what a gated delta rule's chunks cost: decays of scores are no products of matrices."""
    expected = (16 + 16 + 24) * length * product(1, 4, 1) + 4 * delta_rule(length, 8, 6)
    for into, out in [(24, 16), (24, 16), (24, 24), (24, 24), (24, 4), *decays, *gate]:  # q, k, v, o, β
        expected += product(length, into, out)
    assert config.forward_flops(24, length) == expected


def swiglu(tokens: int, width: int, hidden: int) -> int:
    return 2 * product(tokens, width, hidden) + product(tokens, hidden, width)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DenseConfig(hidden=10), swiglu(7, WIDTH, 10)),
        (DenseConfig(hidden=10, activation="gelu"), product(7, WIDTH, 10) + product(7, 10, WIDTH)),
        (
            MoEConfig(n_experts=8, n_activated=3, n_shared=2, expert_hidden=16, shared_hidden=24),
            product(7, WIDTH, 8) + 3 * swiglu(7, WIDTH, 16) + product(7, 3, WIDTH) + swiglu(7, WIDTH, 48),
        ),
        (
            LatentMoEConfig(n_experts=8, n_activated=3, n_shared=1, ratio=4, expert_hidden=16, shared_hidden=24),
            product(7, WIDTH, 8)
            + (product(7, WIDTH, WIDTH // 4) + product(7, WIDTH // 4, WIDTH))
            + 3 * swiglu(7, WIDTH // 4, 16)
            + product(7, 3, WIDTH // 4)
            + swiglu(7, WIDTH, 24),
        ),
        (
            MoEConfig(n_experts=8, n_activated=3, expert_hidden=16, shared_gate="sigmoid", groups=2),
            product(7, WIDTH, 8)
            + 3 * swiglu(7, WIDTH, 16)
            + product(7, 3, WIDTH)
            + swiglu(7, WIDTH, 16)
            + product(7, WIDTH, 1),
        ),
        (NoFFNConfig(), 0),
        (TOYS["toy_ffn"](hidden=10), product(7, WIDTH, 10) + product(7, 10, WIDTH)),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_ffns(config: FFNConfig, expected: int) -> None:
    assert config.forward_flops(WIDTH, 7) == expected


def test_norms_are_not_counted_and_the_head_is() -> None:
    config = hybrid_config()
    counts = {
        forward_flops(replace(config, norm=norm), 20)
        for norm in (RMSNormConfig(), LayerNormConfig(), DynamicTanhConfig(), TOYS["toy_norm"]())
    }
    assert len(counts) == 1
    head = product(20, config.width, 100)
    assert forward_flops(replace(config, vocab_size=config.vocab_size + 100), 20) - counts.pop() == head


def model_of(mixer: str, ffn: str = "dense") -> LanguageModelConfig:
    block = BlockConfig(mixer=MIXERS[mixer], ffn=FFNS[ffn])
    return LanguageModelConfig(vocab_size=31, width=WIDTH, blocks={"a": block}, pattern=("a", "a"))


def rows_of(*rows: list[int]) -> Tensor:
    """Document ids of rows that hold documents of these lengths; a negative length is padding."""
    return torch.tensor(
        [[PADDING if n < 0 else index for index, n in enumerate(row) for _ in range(abs(n))] for row in rows]
    )


@pytest.mark.parametrize("mixer", MIXERS)
def test_training_on_packed_rows_is_training_on_each_document_alone(mixer: str) -> None:
    config = model_of(mixer, "moe")

    def alone(length: int) -> float:
        return length * training_flops_per_token(config, length)

    counter = TrainingFlops(config)
    assert counter.of(rows_of([90])) == pytest.approx(alone(90), rel=1e-12)
    assert counter.of(rows_of([90], [90])) == pytest.approx(2 * alone(90), rel=1e-12)
    packed = rows_of([30, 60], [1, 88, -1], [3, -87], [-90])
    assert counter.of(packed) == pytest.approx(sum(map(alone, (30, 60, 1, 88, 3))), rel=1e-12)
    assert counter.of(rows_of([-90])) == 0
    longer = torch.nn.functional.pad(packed, (0, 50), value=PADDING)
    assert counter.of(longer) == counter.of(packed)


def test_packed_rows_cost_no_pairs_across_documents() -> None:
    """Of attention alone, counted pair by pair: half the documents' length, half the pairs."""
    config, random_lengths = model_of("mha"), random.Random(0).choices(range(1, 40), k=50)
    per_token = TrainingFlops(config).of(rows_of([1]))
    per_pair = 3 * 2 * 2 * 2 * WIDTH  # backward twice forward, two layers, scores and sums of values, × and +
    pairs = sum(1 for length in random_lengths for t in range(length) for s in range(length) if s < t)
    expected = per_token * sum(random_lengths) + per_pair * pairs
    assert TrainingFlops(config).of(rows_of(random_lengths)) == expected
