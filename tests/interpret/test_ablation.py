"""What is left out is gone, and nothing else: against models whose weights have zeros in its place."""

import copy

import pytest
import torch
import torch.nn.functional as F

from swamla.interpret import ablated, cut_effects, edges_between
from swamla.interpret.tracing import above, in_rows, logits_without, next_labels, trace
from swamla.model.language_model import NO_LABEL
from swamla.model.mixers.gdn import GDN
from tests.interpret.models import AROUND, EXPLAINED, build, hybrid, two_rows
from tests.model.helpers import random_tokens


def mean_loss(model, tokens, seq, labels) -> float:
    """Of the model's own forward pass."""
    with torch.no_grad():
        return F.cross_entropy(model(tokens, seq).flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL).item()


def without_head(model, layer: int, head: int):
    """The model with zeros in what reads this head's output."""
    model = copy.deepcopy(model)
    mixer = model.blocks[layer].mixer
    reads = mixer.compress_o if isinstance(mixer, GDN) and mixer.config.latent_dim else mixer.o_proj
    with torch.no_grad():
        reads.weight.unflatten(1, (mixer.config.n_heads, -1))[:, head] = 0
    return model


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", EXPLAINED)
def test_ablations_are_those_of_models_with_zeros_in_their_weights(name: str, around: str) -> None:
    model, tokens = build(name, "mha", around=around), random_tokens(2, 20)
    seq, _ = two_rows()
    labels = next_labels(tokens, seq)
    found = ablated(model, tokens, seq=seq)
    base = mean_loss(model, tokens, seq, labels)
    assert found.loss == pytest.approx(base)
    for layer, rises in enumerate(found.layers):
        assert len(rises.heads) == model.config.layers[layer].mixer.explained_heads
        for head in (0, len(rises.heads) - 1):
            rise = mean_loss(without_head(model, layer, head), tokens, seq, labels) - base
            assert rises.heads[head] == pytest.approx(rise, abs=1e-9)
        silent = copy.deepcopy(model)
        silent.blocks[layer].with_mixed = lambda x_BTD, y_BTD: x_BTD
        assert rises.mixer == pytest.approx(mean_loss(silent, tokens, seq, labels) - base, abs=1e-9)
        silent = copy.deepcopy(model)
        silent.blocks[layer].feed = lambda x_BTD, seq: (x_BTD, {})
        silent.blocks[layer].functions = silent.blocks[layer]._uncompiled()
        assert rises.ffn == pytest.approx(mean_loss(silent, tokens, seq, labels) - base, abs=1e-9)
        assert (rises.ffn == pytest.approx(0, abs=1e-12)) == model.config.layers[layer].ffn.is_absent


def test_a_head_is_left_out_by_an_edge_mask_of_its_own() -> None:
    model, tokens = hybrid(), random_tokens(2, 12)
    head = torch.zeros(1, 4, 1, 1, dtype=torch.bool)
    head[0, 2] = True
    with torch.no_grad():
        expected = without_head(model, 0, 2)(tokens)
    torch.testing.assert_close(logits_without(model, tokens, {0: head}), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", EXPLAINED)
def test_effects_of_cuts_are_rises_of_the_loss_with_these_edges_subtracted(name: str, around: str) -> None:
    model, tokens = build(name, "mha", around=around), random_tokens(3, 16)
    query = torch.tensor([6, 9, 14])
    edges, others = edges_between(16, query, query - 4), edges_between(16, query, query - 5)
    labels = torch.full_like(tokens, NO_LABEL)
    labels[:, query] = tokens[:, query + 1]
    found = cut_effects(model, tokens, {"edges": edges, "others": others})
    assert cut_effects(model, tokens, {"others": others}, labels, layers=[1]) == {1: {"others": found[1]["others"]}}
    base = mean_loss(model, tokens, None, labels)
    for layer, rises in found.items():
        for cut, rise in ((edges, rises["edges"]), (others, rises["others"])):
            logits = logits_without(model, tokens, {layer: cut}).flatten(0, 1)
            loss = F.cross_entropy(logits, labels.flatten(), ignore_index=NO_LABEL).item()
            assert rise == pytest.approx(loss - base, abs=1e-9)
            assert rise != 0


def test_edges_that_have_no_weight_can_be_cut_without_any_effect() -> None:
    """Outside the window of 8, and behind the 3 sinks, nothing is taken."""
    model, tokens = build("swa", "mha"), random_tokens(2, 20)
    query = torch.arange(13, 19)
    sets = {"far": edges_between(20, query, query - 8), "near": edges_between(20, query, query - 2)}
    found = cut_effects(model, tokens, sets)[0]
    assert found["far"] == pytest.approx(0, abs=1e-12)
    assert abs(found["near"]) > 1e-6


def test_effects_do_not_depend_on_how_rows_are_divided(monkeypatch) -> None:
    model, tokens = hybrid(), random_tokens(5, 14)
    labels = random_tokens(5, 14, seed=3)
    labels[2] = NO_LABEL  # a row without any label
    query = torch.arange(4, 12)
    edges = {"some": edges_between(14, query, query - 2), "others": edges_between(14, query, query - 3)}
    whole = ablated(model, tokens, labels), cut_effects(model, tokens, edges, labels)
    monkeypatch.setattr("swamla.interpret.ablation.in_rows", lambda *given: in_rows(*given, max_bytes=1))
    rows = ablated(model, tokens, labels), cut_effects(model, tokens, edges, labels)
    for one, other in zip(whole[0].layers, rows[0].layers, strict=True):
        assert one.heads == pytest.approx(other.heads, abs=1e-12)
        assert (one.mixer, one.ffn) == pytest.approx((other.mixer, other.ffn), abs=1e-12)
    for layer, rises in whole[1].items():
        assert rises == pytest.approx(rows[1][layer], abs=1e-12)


def test_the_layers_above_a_stream_are_the_rest_of_the_model() -> None:
    model, tokens = hybrid(), random_tokens(2, 12)
    (rows,) = in_rows(model, tokens)
    found = trace(model, tokens)
    for index, layer in enumerate(found.layers):
        x = above(model, index, layer.after_BTD, rows)
        torch.testing.assert_close(model.logits(model.head_input(x)), found.logits_BTV, rtol=1e-9, atol=1e-9)
