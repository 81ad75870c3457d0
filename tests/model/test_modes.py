"""Inference before training, and double under autocast: neither changes what a model computes."""

import pytest
import torch

from swamla.ops.layout import Layout

from .helpers import FFNS, MIXERS, assert_close, build_model, hybrid_config, packed, random_tokens

LENGTHS = (5, 1, 14, 20)


@pytest.mark.parametrize("layout", [lambda: packed(*LENGTHS), lambda: Layout.one_document_per_row(1, 40)])
@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
@pytest.mark.parametrize("name", list(MIXERS))
def test_a_layout_that_served_inference_serves_training(name: str, backend: str, layout) -> None:
    model, tokens = build_model(hybrid_config(backend, (name, name), "moe")), random_tokens(1, 40)

    def gradients(seq: Layout) -> list[torch.Tensor]:
        model.zero_grad()
        model.loss(tokens, tokens, seq)[0].backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    seq = layout()
    with torch.inference_mode():
        model(tokens, seq)
    for found, expected in zip(gradients(seq), gradients(layout()), strict=True):
        assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("ffn", list(FFNS))
@pytest.mark.parametrize("name", list(MIXERS))
def test_autocast_leaves_a_model_in_double_alone(name: str, ffn: str) -> None:
    model, tokens, seq = (
        build_model(hybrid_config("auto", (name,), ffn)).double(),
        random_tokens(1, 40),
        packed(*LENGTHS),
    )
    found = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = model.loss(tokens, tokens, seq)[0]
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for with_autocast, without in zip(*found, strict=True):
        assert with_autocast.dtype == torch.float64
        assert_close(with_autocast, without, 1e-12)
