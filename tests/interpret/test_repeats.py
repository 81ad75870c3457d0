"""Measures on repeated rows are what a loop over tokens finds; a layer built to be an induction head has its scores."""

import math
from dataclasses import replace

import pytest
import torch

from swamla.errors import ConfigError
from swamla.interpret import ablated, behavioural_context, copying, head_patterns, in_context, induction, trace
from swamla.interpret.attributing import attribution
from swamla.interpret.patterns import edges_between
from swamla.interpret.repeats import accuracy_of, at_another_length, repeated_rows
from swamla.interpret.tracing import logits_without
from swamla.model.language_model import NO_LABEL
from swamla.shares import wilson
from tests.interpret.models import build, hybrid, induction_model
from tests.model.helpers import MIXERS

MODELS = {
    "hybrid": hybrid,
    "convolutions": lambda: build("kda", "mha", around="post, convolution"),
}
WIDTHS = {"hybrid": (4, 1, 1, 1), "convolutions": (4, 3)}  # kda's own is 6: more than half of a copy of 8
NEAREST = {4: 3, 3: 4, 1: 4}  # tokens back to the first other token: 4, but where the convolution has that one


def test_a_repeated_row_is_a_start_and_distinct_ids_twice() -> None:
    tokens = repeated_rows(range(5, 25), 0, length=12, rows=9, seed=3)
    assert tokens.shape == (9, 25)
    assert (tokens[:, 0] == 0).all()
    assert torch.equal(tokens[:, 1:13], tokens[:, 13:])
    assert all(len(set(row.tolist())) == 12 for row in tokens[:, 1:13])
    assert tokens[:, 1:].min() >= 5
    assert not torch.equal(tokens, repeated_rows(range(5, 25), 0, length=12, rows=9, seed=4))
    with pytest.raises(ConfigError, match="length = 21"):
        repeated_rows(range(5, 25), 0, length=21, rows=1)


def test_without_a_start_a_row_begins_with_an_id_of_its_own() -> None:
    tokens = repeated_rows(range(5, 25), None, length=19, rows=9)
    assert torch.equal(tokens[:, 1:20], tokens[:, 20:])
    assert all(sorted(row.tolist()) == list(range(5, 25)) for row in tokens[:, :20])
    with pytest.raises(ConfigError, match="length = 20"):
        repeated_rows(range(5, 25), None, length=20, rows=1)


@pytest.mark.parametrize("name", MODELS)
def test_measures_of_repeats_are_those_of_a_loop_over_tokens(name: str) -> None:
    model = MODELS[name]()
    tokens = repeated_rows(range(1, 31), 0, length=8, rows=3)
    found = induction(model, tokens)
    with torch.no_grad():
        logits = model(tokens)
    checked: list = []
    losses, right = [], []
    for row in range(3):
        for query in range(9, 16):
            target = tokens[row, query + 1]
            assert tokens[row, query - 8 + 1] == target  # what followed before follows again
            losses.append(-logits[row, query].log_softmax(-1)[target].item())
            right.append(float(logits[row, query].argmax() == target))
    assert found.second_loss == pytest.approx(sum(losses) / len(losses))
    assert found.accuracy == pytest.approx(sum(right) / len(right))
    for block, layer, measured in zip(model.blocks, trace(model, tokens).layers, found.layers, strict=True):
        assert measured.conv == WIDTHS[name][len(checked)]
        checked.append(block)
        weight = layer.mixer.weight_BHTS.abs()
        for head in range(weight.shape[1]):
            shares, wide, hits, hits_conv = [], [], [], []
            for row in range(3):
                for query in range(9, 16):
                    line = weight[row, head, query]
                    shares.append((line[query - 7] / line.sum()).item())
                    wide.append((line[query - 7 : query - 7 + measured.conv].sum() / line.sum()).item())
                    hits.append(float(line.argmax() == query - 7))
                    hits_conv.append(float(query - 7 <= line.argmax() < query - 7 + measured.conv))
            assert measured.induction[head] == pytest.approx(sum(shares) / len(shares))
            assert measured.induction_conv[head] == pytest.approx(sum(wide) / len(wide))
            assert measured.hit[head] == pytest.approx(sum(hits) / len(hits))
            assert measured.hit_conv[head] == pytest.approx(sum(hits_conv) / len(hits_conv))
        query = torch.arange(9, 16)
        for rise, sources in (
            (measured.cut, [query - 7]),
            (measured.cut_conv, [query - 7 + i for i in range(measured.conv)]),
            (measured.control, [query - NEAREST[measured.conv] + i for i in range(measured.conv)]),
        ):
            cut = logits_without(model, tokens, {len(checked) - 1: edges_between(17, query, *sources)})[:, query]
            loss = -cut.log_softmax(-1).gather(2, tokens[:, query + 1][..., None]).mean()
            assert rise == pytest.approx(loss.item() - found.second_loss, abs=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_attributions_on_repeats_are_those_of_the_edges_to_what_followed(name: str) -> None:
    model, tokens = MODELS[name](), repeated_rows(range(1, 31), 0, length=8, rows=3)
    query = torch.arange(9, 16)
    expected = attribution(model, tokens, edges_between(17, query, query - 7))
    assert [layer.attribution for layer in induction(model, tokens).layers] == [layer.score for layer in expected]


def test_a_layer_built_to_be_an_induction_head_has_the_scores_of_one() -> None:
    model = induction_model()
    tokens = repeated_rows(range(1, 31), 0, length=10, rows=4)
    found = induction(model, tokens)
    assert found.accuracy == 1
    assert found.second_loss < 1e-3
    assert found.first_loss > 3
    (layer,) = found.layers
    assert layer.conv == 2
    for score in (layer.induction, layer.induction_conv, layer.hit, layer.attribution):
        assert score == pytest.approx((1.0,), abs=1e-4)
    assert layer.duplicate == pytest.approx((0.0,), abs=1e-4)
    assert layer.cut > 3
    assert layer.control == pytest.approx(0, abs=1e-4)
    assert copying(model) == ((pytest.approx(1.0),),)
    assert in_context(model, tokens, early=3, late=15).score < -3
    labels = torch.full_like(tokens, NO_LABEL)
    labels[:, 11:20] = tokens[:, 12:]
    without = ablated(model, tokens, labels).layers[0]
    assert without.heads == pytest.approx((math.log(31),), abs=1e-3)  # all ids are equally likely
    assert without.mixer == pytest.approx(math.log(31), abs=1e-3)


@pytest.mark.parametrize("length", [6, 10, 13])
def test_it_needs_what_followed_and_what_was_before_that_and_no_more(length: int) -> None:
    found = behavioural_context(induction_model(), repeated_rows(range(1, 31), 0, length=length, rows=4))
    assert found.tokens == length + 1
    assert found.losses[length] - found.loss > 0.1


def test_its_effective_context_reaches_as_far_as_the_first_copy() -> None:
    tokens = repeated_rows(range(1, 31), 0, length=10, rows=4)
    (found,) = head_patterns(induction_model(), torch.cat((tokens, tokens[:, 1:], tokens[:, 1:]), dim=1))
    assert found.effective_context[0] >= 10
    assert found.previous[0] < 0.1


def test_the_control_is_of_edges_that_a_window_has_if_it_has_those_of_induction() -> None:
    """Edges outside the window would add nothing, and a control of 0 would tell nothing."""
    mixers = {"swa": replace(MIXERS["swa"], window=8, sinks=0)}  # what followed stands 7 tokens back
    found = induction(build("swa", mixers=mixers), repeated_rows(range(1, 31), 0, length=8, rows=3)).layers[0]
    assert found.cut != 0
    assert found.control != 0


@pytest.mark.parametrize("length", range(2, 14))
@pytest.mark.parametrize("taps", [1, 2, 4, 7])
def test_the_control_has_as_many_edges_as_the_cut_and_none_of_them(length: int, taps: int, monkeypatch) -> None:
    """Half as far away; where that overlapped, with a long convolution or a short copy, as near as is needed."""
    seen = []

    def cuts(model, tokens, edges, **settings):
        seen.append(edges)
        return {index: dict.fromkeys(edges, 0.0) for index in settings.get("layers", range(1))}

    monkeypatch.setattr("swamla.interpret.repeats.cut_effects", cuts)
    monkeypatch.setattr("swamla.interpret.repeats.conv_width", lambda block: taps)
    found = induction(build("mha"), repeated_rows(range(1, 31), 0, length=length, rows=1)).layers[0]
    assert found.conv == min(taps, length // 2) or found.conv == 1
    for edges in seen:
        cut, others = edges.get("wide", edges.get("edges")), edges["others"]
        assert not (cut & others).any()
        assert torch.equal(cut.sum(dim=1), others.sum(dim=1))
        assert not others.triu(1).any()
        if "wide" not in edges and length > 2:
            query = torch.arange(length + 1, 2 * length)
            assert torch.equal(others, edges_between(2 * length + 1, query, query - length // 2))


def test_with_copies_of_another_length_accuracy_and_hits_are_those_of_their_own_rows() -> None:
    model = hybrid()
    tokens = repeated_rows(range(1, 31), 0, length=9, rows=3)
    whole, found = induction(model, tokens), at_another_length(model, tokens)
    assert (found.length, found.chance, found.predictions) == (9, 1 / 9, 24)
    assert (found.accuracy, found.interval) == (whole.accuracy, whole.interval)
    assert found.hit_conv == tuple(layer.hit_conv for layer in whole.layers)


def test_an_accuracys_interval_is_wider_where_rows_differ_and_is_of_all_predictions_where_all_are_alike() -> None:
    even, apart = (accuracy_of(right, [20] * 4) for right in ([10, 10, 10, 10], [20, 20, 0, 0]))
    assert even["accuracy"] == apart["accuracy"] == 0.5
    assert even["interval"] == wilson(40, 80)
    assert apart["interval"][0] < 0.2
    assert accuracy_of([0, 0], [40, 40])["interval"] == wilson(0, 80)
    assert accuracy_of([7], [10])["predictions"] == 10


@pytest.mark.parametrize("seed", [-1, 1 << 63])
def test_a_seed_that_no_generator_takes_is_told(seed: int) -> None:
    with pytest.raises(ConfigError, match="seed = "):
        repeated_rows(range(5, 25), 0, length=12, rows=1, seed=seed)
