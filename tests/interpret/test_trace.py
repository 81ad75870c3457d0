"""Traces add up to the model; what is cut is gone, and nothing else; measures are what a loop over tokens finds."""

import math
from dataclasses import replace

import pytest
import torch

from swamla.interpret import ablated, copying, cut_effects, edges_between, head_patterns, trace
from swamla.interpret.attributing import attribution
from swamla.interpret.tracing import layout_of, logits_without, next_labels
from swamla.model.language_model import NO_LABEL
from swamla.ops.layout import Layout
from tests.interpret import models
from tests.interpret.models import AROUND, EXPLAINED
from tests.model.helpers import MIXERS, build_model, hybrid_config, packed, random_tokens

CONFIGS = {
    "hybrid": hybrid_config(),
    "kda": hybrid_config(pattern=("kda", "mha")),
    "n-grams, bounded logits": replace(hybrid_config(), ngram_buckets=(31, 64), logit_cap=5.0),
    "experts": hybrid_config(ffn="moe"),
}


def build(name: str):
    config = CONFIGS[name]
    if name == "kda":
        blocks = {kind: replace(block, conv=3, norm_place="post") for kind, block in config.blocks.items()}
        config = replace(config, blocks=blocks)
    return build_model(config).double().eval()


@pytest.mark.parametrize("rows", ["whole", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_trace_has_the_models_logits_and_its_layers_add_up(name: str, rows: str) -> None:
    model, tokens = build(name), random_tokens(1, 24)
    seq = packed(9, 1, 14) if rows == "packed" else Layout.one_document_per_row(1, 24)
    found = trace(model, tokens, seq)
    with torch.no_grad():
        torch.testing.assert_close(found.logits_BTV, model(tokens, seq), rtol=1e-9, atol=1e-9)
    for below, above in zip(found.layers, found.layers[1:], strict=False):
        if not model.config.ngram_buckets:
            assert torch.equal(below.after_BTD, above.before_BTD)


@pytest.mark.parametrize("name", ["hybrid", "kda"])
def test_to_cut_all_edges_of_a_layer_is_to_have_no_output_projection(name: str) -> None:
    model, tokens = build(name), random_tokens(2, 20)
    everything = torch.ones(20, 20, dtype=torch.bool)
    found = logits_without(model, tokens, {1: everything})
    mixer = model.blocks[1].mixer
    with torch.no_grad():
        mixer.o_proj.weight.zero_()
        torch.testing.assert_close(found, model(tokens), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(logits_without(model, tokens, {}), model(tokens), rtol=1e-9, atol=1e-9)


def test_token_losses_are_those_whose_sum_the_model_trains_on() -> None:
    model, tokens = build("n-grams, bounded logits"), random_tokens(2, 12)
    labels = random_tokens(2, 12, seed=4)
    labels[0, 3] = NO_LABEL
    with torch.no_grad():
        losses, (total, _) = model.token_losses(tokens, labels), model.loss(tokens, labels)
    assert losses.shape == (2, 12)
    assert losses[0, 3] == 0
    torch.testing.assert_close(losses.sum(), total)


def test_every_mixer_but_those_without_a_sum_can_be_traced() -> None:
    for name in ("mha", "swa", "mla", "gdn", "kda", "latent"):
        assert name in MIXERS
        model = build_model(hybrid_config(pattern=(name, name))).eval()
        assert len(trace(model, random_tokens(1, 9)).layers) == 2


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", EXPLAINED)
def test_a_model_in_16_bits_has_measures_too(name: str, around: str) -> None:
    model, tokens = models.build(name, "mha", around=around).bfloat16(), random_tokens(2, 16)
    query = torch.arange(5, 14)
    edges = edges_between(16, query, query - 3)
    (first, _), whole = trace(model, tokens).layers, ablated(model, tokens)
    assert first.mixer.output().dtype == torch.float32
    assert first.after_BTD.dtype == torch.bfloat16
    numbers = [
        whole.loss,
        *(rise for layer in whole.layers for rise in (*layer.heads, layer.mixer, layer.ffn)),
        *(rises["3"] for rises in cut_effects(model, tokens, {"3": edges}).values()),
        *(score for layer in attribution(model, tokens, edges) for score in layer.score),
        *(score for layer in copying(model) for score in layer),
        *(share for layer in head_patterns(model, tokens) for share in layer.entropy),
    ]
    assert all(math.isfinite(number) for number in numbers)
    labels = next_labels(tokens, layout_of(tokens, None))
    with torch.no_grad():
        own = model.token_losses(tokens, labels).double().sum().item() / 30
    assert whole.loss == pytest.approx(own, rel=0.03)
