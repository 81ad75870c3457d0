"""Rows of which it is known that all hold equally much: no masks, long prompts in bands, and still `forward`."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from swamla.errors import ConfigError
from swamla.inference import decoding
from swamla.inference.decoding import Decoder
from swamla.model.language_model import LanguageModel
from swamla.model.mixers.latent import LatentConfig
from swamla.model.mixers.mixer import Mixer, min_tokens_to_expand
from swamla.model.mixers.mla import MLAConfig
from swamla.model.mixers.swa import SWAConfig
from swamla.ops import cached_attention
from swamla.ops.attention.cached import rounded_up
from swamla.ops.layout import Layout

from .helpers import (
    MIXERS,
    WINDOW,
    assert_close,
    build_mixer,
    build_model,
    hybrid_config,
    random_input,
    random_tokens,
    whole,
)

LONG = 150
CUTS = ([], [1], [1, 2, 3], [WINDOW, WINDOW + 1], [20, 60], [3, 90, 91], [60, 61, 62, 140], list(range(1, LONG)))
every_mixer = pytest.mark.parametrize("kind", MIXERS)


def in_uniform_pieces(mixer: Mixer, x_BTD: Tensor, cuts: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """The mixer's outputs when x arrives cut at `cuts`, each piece with the number of tokens before it."""
    batch, time, _ = x_BTD.shape
    state = mixer.init_state(batch, time, dtype=dtype, device="cpu")
    pieces = [
        mixer.step(x_BTD[:, begin:end], state, Layout.continuing_uniform(begin, batch, end - begin))
        for begin, end in pairwise([0, *cuts, time])
    ]
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@every_mixer
@torch.no_grad()
def test_uniform_rows_in_any_split_are_forward(kind: str, cuts: list[int]) -> None:
    mixer, x = build_mixer(MIXERS[kind]), random_input(2, LONG)
    assert_close(in_uniform_pieces(mixer, x, cuts), mixer(x, whole(x)), 1e-5)


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (1, 5), (3, 0), (3, 30), (7, 2), (12, 12), (40, 4)])
@torch.no_grad()
def test_uniform_rows_fill_every_shape_of_ring(window: int, sinks: int) -> None:
    mixer, x = build_mixer(SWAConfig(n_heads=4, window=window, sinks=sinks)), random_input(1, 100)
    expected = mixer(x, whole(x))
    for cuts in ([], [1], [2, 44], [44, 88], [45, 46, 47], [13, 26, 39, 52, 65], list(range(1, 100))):
        assert_close(in_uniform_pieces(mixer, x, cuts), expected, 1e-5, f"cut at {cuts}")


@every_mixer
@torch.no_grad()
def test_uniform_rows_leave_the_state_that_masks_leave(kind: str) -> None:
    """After pieces of all kinds, so that the one way of stepping can go on where the other stopped."""
    mixer, x = build_mixer(MIXERS[kind]), random_input(2, 60)
    uniform, masked = (mixer.init_state(2, 60, dtype=torch.float32, device="cpu") for _ in range(2))
    for begin, end in pairwise([0, 25, 26, 27, 29, 60]):
        piece, valid = x[:, begin:end], torch.ones(2, end - begin, dtype=torch.bool)
        mixer.step(piece, uniform, Layout.continuing_uniform(begin, 2, end - begin))
        mixer.step(piece, masked, Layout.continuing(torch.full((2,), begin), valid))
        for found, expected in zip(uniform.tensors(), masked.tensors(), strict=True):
            assert_close(found, expected, 1e-5, f"after {end}")


@pytest.mark.parametrize("config", [MIXERS["mla"], LatentConfig(n_heads=2, n_latent=24)], ids=["mla", "latent"])
@torch.no_grad()
def test_expanded_latents_give_what_absorbed_ones_give(config: MLAConfig | LatentConfig) -> None:
    mixer, x = build_mixer(config), random_input(2, 40)
    out = []
    for pays_from in (1, 1000):
        mixer.min_to_expand = pays_from
        out.append(in_uniform_pieces(mixer, x, [10, 11, 30]))
    assert_close(out[0], out[1], 1e-5)
    assert not torch.equal(out[0], out[1]), "both went the same way"


def test_expansion_pays_where_the_products_say_so() -> None:
    """Rank 128, 32 + 64 numbers a head: 256 T S products absorbed against 96 T S + 128 · 96 S."""
    assert min_tokens_to_expand(128, 96) == pytest.approx(128 * 96 / 160)
    assert min_tokens_to_expand(16, 32) == float("inf")


@pytest.mark.parametrize(("groups", "value"), [(6, 8), (2, 8), (1, 5), (3, 5)])
@pytest.mark.parametrize("time", [1, 2, 130, 300])
def test_no_mask_is_the_mask_of_all_but_later_tokens(groups: int, value: int, time: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, time, 6, 8), (2, 300, groups, 8), (2, 300, groups, value))
    )
    allowed = torch.ones(2, time, 300, dtype=torch.bool).tril(300 - time)
    torch.testing.assert_close(
        cached_attention(q, k, v, None, scale=0.3), cached_attention(q, k, v, allowed, scale=0.3)
    )


def test_more_new_tokens_than_held_ones_are_refused() -> None:
    q, k = torch.zeros(1, 4, 2, 8), torch.zeros(1, 3, 2, 8)
    with pytest.raises(ConfigError, match="no more tokens than the cache, 3"):
        cached_attention(q, k, k, None)


@torch.no_grad()
def test_a_state_knows_what_its_rows_hold_as_long_as_they_hold_equally_much() -> None:
    model, tokens = build_model(hybrid_config()).eval(), random_tokens(2, 30)
    state = model.init_state(2, 30)
    model.step(tokens[:, :7], state)
    assert state.uniform_length == 7
    all_valid = torch.ones(2, 3, dtype=torch.bool)
    model.step(tokens[:, 7:10], state, all_valid)
    assert state.uniform_length == 10
    model.step(tokens[:, :2], state, torch.tensor([[True, True], [True, False]]))
    assert state.uniform_length is None
    model.step(tokens[:, :1], state)
    assert state.length_B.tolist() == [13, 12]
    model.step(tokens[:, :1], state, torch.tensor([[False], [True]]))
    assert state.uniform_length == 13


def test_of_a_prompt_the_head_sees_the_last_token_alone() -> None:
    model, seen = build_model(hybrid_config()).eval(), []
    hook = model.head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    try:
        Decoder(model).generate([[1] * 50, [2] * 20], 3)
    finally:
        hook.remove()
    assert [shape[:-1].numel() for shape in seen] == [2, 2, 2]


@pytest.mark.parametrize("large", [7, 64])
def test_prompts_are_cut_into_bounded_pieces(monkeypatch: pytest.MonkeyPatch, large: int) -> None:
    monkeypatch.setattr(decoding, "PREFILL_CHUNK", large)
    monkeypatch.setattr(decoding, "MASKED_CHUNK", 5)
    model, sizes, step = build_model(hybrid_config()).eval(), [], LanguageModel.step_hidden
    monkeypatch.setattr(
        LanguageModel,
        "step_hidden",
        lambda self, tokens, *rest: sizes.append(tokens.shape) or step(self, tokens, *rest),
    )
    Decoder(model).generate([[1] * 23, [2] * 20], 1)
    assert sum(time for _, time in sizes) == 23
    assert max(shape.numel() for shape in sizes) <= large
    assert sizes[-1] == (2, 3)


def test_lengths_are_rounded_to_few_by_little() -> None:
    for length in (*range(1, 3000), 8191, 8192, 8193, 32768, 100_000):
        rounded = rounded_up(length, 128)
        assert length <= rounded < length + max(128, length / 16 + 1)
        assert rounded % 128 == 0
    assert len({rounded_up(length, 128) for length in range(1, 32769)}) < 100


@torch.no_grad()
def test_a_long_prompt_behind_others_attends_as_the_mask_says() -> None:
    """Behind 2,048 tokens lengths are rounded to more than a block's; here with groups of heads and narrow values."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, n, *shape, generator=generator) for n, shape in ((700, (4, 8)), (4700, (2, 8)), (4700, (2, 6)))
    )
    allowed = torch.ones(1, 700, 4700, dtype=torch.bool).tril(4000)
    assert_close(cached_attention(q, k, v, None), cached_attention(q, k, v, allowed), 1e-5)
