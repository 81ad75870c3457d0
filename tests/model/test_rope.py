"""Rotary positions: what makes them relative, and their tables against transformers'."""

import pytest
import torch
from torch import Tensor

from swamla.model.rope import LinearScaling, Llama3Scaling, RopeConfig, Scaling, YarnScaling
from swamla.ops.layout import Layout
from swamla.ops.rotary import rotate

from .helpers import packed

HEAD = 16
LAYOUTS = ["half", "interleaved"]
layouts = pytest.mark.parametrize("layout", LAYOUTS)
SCALINGS = {
    "none": (None, {"rope_type": "default"}),
    "linear": (LinearScaling(factor=4.0), {"rope_type": "linear", "factor": 4.0}),
    "yarn": (
        YarnScaling(factor=8.0, original_length=256),
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256},
    ),
    "yarn with betas": (
        YarnScaling(factor=2.5, original_length=1024, beta_fast=20.0, beta_slow=3.0),
        {
            "rope_type": "yarn",
            "factor": 2.5,
            "original_max_position_embeddings": 1024,
            "beta_fast": 20.0,
            "beta_slow": 3.0,
        },
    ),
    "yarn with mscales": (
        YarnScaling(factor=40.0, original_length=4096, mscale=0.707, mscale_all_dim=0.5),
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 0.707,
            "mscale_all_dim": 0.5,
        },
    ),
    "llama3": (
        Llama3Scaling(factor=8.0, original_length=128),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 128,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ),
    "llama3 with other factors": (
        Llama3Scaling(factor=32.0, original_length=512, low_freq_factor=0.5, high_freq_factor=20.0),
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "original_max_position_embeddings": 512,
            "low_freq_factor": 0.5,
            "high_freq_factor": 20.0,
        },
    ),
}


def at(position: int) -> Layout:
    """One token at `position`."""
    return Layout.continuing(torch.tensor([position]), torch.ones(1, 1, dtype=torch.bool))


def turned(x: Tensor, rope: RopeConfig, position: int) -> Tensor:
    return rotate(x.view(1, 1, 1, -1), rope.tables(at(position), x.numel()), rope.layout).flatten()


@layouts
@pytest.mark.parametrize("scaling", [scaling for scaling, _ in SCALINGS.values()], ids=SCALINGS)
def test_scores_depend_on_the_distance_only(layout: str, scaling: Scaling | None) -> None:
    rope = RopeConfig(layout=layout, scaling=scaling)
    q, k = torch.randn(2, HEAD, generator=torch.Generator().manual_seed(0))
    for distance in (0, 1, 9, 50):
        scores = [turned(q, rope, start + distance) @ turned(k, rope, start) for start in (0, 3, 100)]
        torch.testing.assert_close(torch.stack(scores), scores[0].expand(3), atol=2e-5, rtol=0)
    near, far = (turned(q, rope, 5) @ turned(k, rope, 5 - distance) for distance in (0, 4))
    assert (near - far).abs() > 1e-3


@layouts
def test_a_rotation_keeps_lengths_and_position_zero(layout: str) -> None:
    rope = RopeConfig(layout=layout)
    x = torch.randn(HEAD, generator=torch.Generator().manual_seed(0))
    assert torch.equal(turned(x, rope, 0), x)
    torch.testing.assert_close(turned(x, rope, 77).norm(), x.norm())
    assert not torch.allclose(turned(x, rope, 77), x)


def test_both_layouts_are_the_same_rotation_of_different_pairs() -> None:
    x = torch.randn(HEAD, generator=torch.Generator().manual_seed(0))
    half = turned(x, RopeConfig(layout="half"), 13)
    pairs_side_by_side = x.view(2, -1).T.flatten()
    interleaved = turned(pairs_side_by_side, RopeConfig(layout="interleaved"), 13)
    torch.testing.assert_close(interleaved.view(-1, 2).T.flatten(), half)


@pytest.mark.parametrize("base", [10000.0, 500.0])
@pytest.mark.parametrize(("scaling", "theirs"), SCALINGS.values(), ids=SCALINGS)
def test_tables_are_transformers(scaling: Scaling | None, theirs: dict, base: float) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=4 * HEAD,
        num_attention_heads=4,
        max_position_embeddings=theirs.get("original_max_position_embeddings", 256),
        rope_parameters={"rope_theta": base, **theirs},
    )
    position = torch.arange(300)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), position)
    found = RopeConfig(base=base, scaling=scaling).tables(Layout.one_document_per_row(1, 300), HEAD)
    torch.testing.assert_close(found[0][:, :, 0], cos[..., : HEAD // 2], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1][:, :, 0], sin[..., : HEAD // 2], atol=1e-5, rtol=0)


def test_positions_restart_at_every_document() -> None:
    rope = RopeConfig()
    cos, sin = rope.tables(packed(7, 5), HEAD)
    alone_cos, alone_sin = rope.tables(Layout.one_document_per_row(1, 7), HEAD)
    assert torch.equal(cos[:, 7:], alone_cos[:, :5])
    assert torch.equal(sin[:, :7], alone_sin)


def test_tables_are_fp32_made_once_a_layout_and_the_rotated_keep_their_dtype() -> None:
    seq = Layout.one_document_per_row(2, 4000)
    rope = RopeConfig()
    tables = rope.tables(seq, HEAD)
    assert tables[0].dtype == torch.float32
    assert rope.tables(seq, HEAD) is tables
    assert RopeConfig(base=99.0).tables(seq, HEAD) is not tables
    assert rope.tables(seq, 2 * HEAD) is not tables
    x = torch.randn(2, 4000, 1, HEAD, generator=torch.Generator().manual_seed(0))
    rounded = rotate(x.bfloat16(), tables, "half")
    assert rounded.dtype == torch.bfloat16
    exact = rotate(x, tables, "half")
    assert (rounded.float() - exact).norm() < 1e-2 * exact.norm()
