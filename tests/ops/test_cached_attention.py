"""Attention to a state where no mask is given: few scores all at once, many under masks of bounded size."""

from typing import Any

import pytest
import torch
from torch import Tensor

from swamla.ops import cached_attention
from swamla.ops.attention import cached
from swamla.ops.attention.cached import attend_to_cache, attend_to_latents
from swamla.ops.attention.reference import reference_attention


def inputs(
    batch: int, time: int, size: int, heads: int, groups: int, value: int, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys of width 8, and values."""
    torch.manual_seed(0)
    shapes = (batch, time, heads, 8), (batch, size, groups, 8), (batch, size, groups, value)
    q, k, v = (torch.randn(shape, device=device) for shape in shapes)
    return q, k, v


def all_but_later(batch: int, time: int, size: int) -> Tensor:
    return torch.ones(batch, time, size, dtype=torch.bool).tril(size - time)


def watch(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    """The arguments of every call of a function of the module, those by name at the end."""
    calls, function = [], getattr(cached, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append((*args, *kwargs.values()))
        return function(*args, **kwargs)

    monkeypatch.setattr(cached, name, watched)
    return calls


@pytest.mark.parametrize("time", [1, 16])
@pytest.mark.parametrize(("groups", "value"), [(4, 8), (2, 8), (1, 5)])
@torch.no_grad()
def test_sink_logits_are_those_of_the_reference_with_a_mask_and_without(groups: int, value: int, time: int) -> None:
    q, k, v = inputs(2, time, 60, 4, groups, value)
    logit = torch.tensor([-1.0, 0.0, 2.0, 5.0])
    allowed = all_but_later(2, time, 60)
    expected = reference_attention(q, k, v, allowed, sink_logit_H=logit)
    for given in (allowed, None):
        found = cached_attention(q, k, v, given, sink_logit_H=logit)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    nothing = cached_attention(q, k, v, torch.zeros_like(allowed), sink_logit_H=logit)
    assert not nothing.any()


@pytest.mark.parametrize("size", [16, 60])
@pytest.mark.parametrize(("groups", "value"), [(4, 8), (2, 8), (4, 5), (1, 5)])
@torch.no_grad()
def test_short_pieces_of_many_rows_and_heads_are_multiplied_at_once(
    monkeypatch: pytest.MonkeyPatch, groups: int, value: int, size: int
) -> None:
    q, k, v = inputs(8, 16, size, 4, groups, value)
    expected = reference_attention(q, k, v, all_but_later(8, 16, size))
    by_head, at_once = watch(monkeypatch, "_in_blocks"), watch(monkeypatch, "_block")
    torch.testing.assert_close(cached_attention(q, k, v, None), expected, atol=1e-5, rtol=1e-5)
    assert (len(by_head), len(at_once)) == (0, 1)
    monkeypatch.setattr(cached, "FEW", 0)
    torch.testing.assert_close(cached_attention(q, k, v, None), expected, atol=1e-5, rtol=1e-5)
    assert (len(by_head), len(at_once)) == (1, 1)


@torch.no_grad()
def test_long_pieces_are_multiplied_by_head(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(1, 128, 128, 2, 2, 8)
    by_head = watch(monkeypatch, "_in_blocks")
    expected = reference_attention(q, k, v, all_but_later(1, 128, 128))
    torch.testing.assert_close(cached_attention(q, k, v, None), expected, atol=1e-5, rtol=1e-5)
    assert len(by_head) == 1


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(("groups", "value"), [(6, 8), (2, 8), (2, 5)])
@torch.no_grad()
def test_neither_masks_nor_scores_outgrow_their_bound(
    monkeypatch: pytest.MonkeyPatch, groups: int, value: int, given: bool
) -> None:
    monkeypatch.setattr(cached, "SCORES", 3000)
    monkeypatch.setattr(cached, "FEW", 1 << 40)  # as on an accelerator, all heads at once
    q, k, v = inputs(2, 40, 100, 6, groups, value)
    allowed = all_but_later(2, 40, 100)
    fused = watch(monkeypatch, "scaled_dot_product_attention")
    written, matmuls = watch(monkeypatch, "_masked"), watch(monkeypatch, "_matmuls")
    found = cached_attention(q, k, v, allowed if given else None)
    torch.testing.assert_close(found, reference_attention(q, k, v, allowed), atol=1e-5, rtol=1e-5)
    masks = [call[3] for call in (*fused, *matmuls)]
    assert len(masks) > 1
    assert max(mask.numel() for mask in masks) <= 3000
    assert max((score.numel() for score, _ in written), default=0) <= 3000
    assert bool(written) == (value == 5)


@pytest.mark.parametrize("value", [8, 5])
def test_masks_on_an_accelerator_are_bounded_too(monkeypatch: pytest.MonkeyPatch, value: int) -> None:
    """The device "meta" has no numbers, and goes the ways of an accelerator."""
    monkeypatch.setattr(cached, "SCORES", 1000)
    q, k, v = inputs(1, 64, 200, 4, 2, value, "meta")
    blocks = watch(monkeypatch, "_block")
    allowed = torch.ones(1, 64, 200, dtype=torch.bool, device="meta")
    assert attend_to_cache(q, k, v, allowed, scale=1.0).shape == (1, 64, 4, value)
    assert len(blocks) > 1
    assert max(2 * call[3].numel() for call in blocks) <= cached.ON_ACCELERATORS * 1000


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_masks_of_latents_are_made_block_by_block(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    torch.manual_seed(0)
    q, latent = torch.randn(batch, 30, 2, 12), torch.randn(batch, 80, 12)
    expected = attend_to_latents(q, latent, 70, all_but_later(batch, 30, 70), scale=0.3)
    monkeypatch.setattr(cached, "SCORES", 2000)
    blocks = watch(monkeypatch, "_latent_block")
    torch.testing.assert_close(attend_to_latents(q, latent, 70, None, scale=0.3), expected, atol=1e-5, rtol=1e-5)
    assert len(blocks) > 1
    assert max(batch * 2 * call[3].numel() for call in blocks) <= 2000


@pytest.mark.parametrize(("groups", "value"), [(4, 8), (2, 8), (4, 5), (1, 5)])
@pytest.mark.parametrize(("time", "size"), [(2, 40), (39, 40), (40, 40)])
def test_an_accelerator_attends_behind_cached_tokens_in_one_call(groups: int, value: int, time: int, size: int) -> None:
    q, k, v = inputs(3, time, size, 4, groups, value)
    found = cached.attend_lower_right(q, k, v, 0.3)
    torch.testing.assert_close(found, reference_attention(q, k, v, all_but_later(3, time, size), scale=0.3))


def test_on_an_accelerator_no_block_of_queries_copies_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, blocks = watch(monkeypatch, "attend_lower_right"), watch(monkeypatch, "_block")
    o = attend_to_cache(*inputs(8, 512, 4096, 4, 2, 8, "meta"), None, scale=1.0)
    assert (tuple(o.shape), len(fused), len(blocks)) == ((8, 512, 4, 8), 1, 0)
