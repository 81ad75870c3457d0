"""Patterns are what a loop over tokens finds, for every mixer, for packed rows, and however rows are divided."""

import gc
import math
import weakref
from dataclasses import replace

import pytest
import torch

from swamla.errors import UsageError
from swamla.interpret import (
    ablated,
    cut_effects,
    edge_scores,
    edges_between,
    head_patterns,
    in_context,
    load_by_class,
    logit_lens,
    trace,
    walk,
)
from swamla.interpret.attributing import attribution
from swamla.interpret.tracing import in_rows
from swamla.ops.layout import Layout
from tests.interpret.models import EXPLAINED, VOCABULARY, build, hybrid, two_rows
from tests.model.helpers import MIXERS, random_tokens


@pytest.mark.parametrize("name", EXPLAINED)
def test_patterns_are_those_of_a_loop_over_the_tokens_of_packed_rows(name: str) -> None:
    model, tokens = build(name), random_tokens(2, 20)
    seq, begin = two_rows()
    (found,) = head_patterns(model, tokens, seq, sinks=2)
    weight = trace(model, tokens, seq).layers[0].mixer.weight_BHTS.abs()
    for head in range(weight.shape[1]):
        previous, sink, entropy, near = [], [], [], [0.0] * 20
        for row in range(2):
            for t in range(20):
                first = int(begin[row, t])
                if seq.document_BT[row, t] < 0 or t == first:
                    continue
                share = [w / weight[row, head, t].sum().item() for w in weight[row, head, t].tolist()]
                previous.append(share[t - 1])
                sink.append(share[first] + share[first + 1])
                bits = -sum(p * math.log(p) for p in share if p > 0)
                entropy.append(bits / math.log(t - first + 1))
                for s in range(first + 2, t + 1):
                    near[t - s] += share[s]
        assert found.previous[head] == pytest.approx(sum(previous) / len(previous))
        assert found.sink[head] == pytest.approx(sum(sink) / len(sink))
        assert found.entropy[head] == pytest.approx(sum(entropy) / len(entropy))
        smallest = next(d for d in range(1, 21) if sum(near[:d]) >= 0.9 * sum(near))
        assert found.effective_context[head] == smallest


def test_a_head_that_sees_two_tokens_has_an_effective_context_of_two_at_most() -> None:
    model = build("swa", mixers={"swa": replace(MIXERS["swa"], window=2, sinks=1)})
    (found,) = head_patterns(model, random_tokens(2, 20))
    assert max(found.effective_context) <= 2
    assert min(found.sink) > 0


@pytest.mark.parametrize("name", EXPLAINED)
def test_scores_of_edges_are_those_of_a_loop_over_queries(name: str) -> None:
    model, tokens = build(name), random_tokens(2, 20)
    query, source = torch.tensor([[7, 11, 15], [3, 9, 19]]), torch.tensor([[2, 10, 15], [1, 9, 4]])
    edges = edges_between(20, query, source, source - 1)
    (found,) = edge_scores(model, tokens, {"some": edges, "same": edges_between(20, query[0], query[0])})
    weight = trace(model, tokens).layers[0].mixer.weight_BHTS.abs()
    for head in range(weight.shape[1]):
        share, hit, own = [], [], []
        for row in range(2):
            for t, s in zip(query[row].tolist(), source[row].tolist(), strict=True):
                line = weight[row, head, t]
                share.append(((line[s] + line[s - 1]) / line.sum()).item())
                hit.append(line.argmax().item() in (s, s - 1))
            own.extend((weight[row, head, t, t] / weight[row, head, t].sum()).item() for t in query[0])
        assert found["some"].share[head] == pytest.approx(sum(share) / 6)
        assert found["some"].hit[head] == pytest.approx(sum(hit) / 6)
        assert found["same"].share[head] == pytest.approx(sum(own) / 6)


def test_rows_come_in_blocks_of_whole_documents_and_nothing_depends_on_their_size(monkeypatch) -> None:
    model, tokens = hybrid(), random_tokens(5, 20)
    seq, _ = two_rows()
    document = torch.cat([seq.document_BT, seq.document_BT, seq.document_BT[:1]])
    seq = type(seq).from_documents(document)
    whole = head_patterns(model, tokens, seq)
    blocks = list(in_rows(model, tokens, seq, max_bytes=2 * 8 * 20 * 4 * 32))
    assert [block.index for block in blocks] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    for block in blocks:
        assert torch.equal(block.seq.document_BT, document[block.index])
        assert torch.equal(block.seq.position_BT, seq.position_BT[block.index])
    monkeypatch.setattr("swamla.interpret.patterns.in_rows", lambda *given: in_rows(*given, max_bytes=1))
    for one, other in zip(head_patterns(model, tokens, seq), whole, strict=True):
        assert one.effective_context == other.effective_context
        for name in ("previous", "sink", "entropy"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-12)


def test_only_the_layers_that_are_kept_live() -> None:
    """`walk` makes a layer's weights when it is asked for them, and keeps none."""
    model, tokens = hybrid(), random_tokens(1, 12)
    layers = walk(model, tokens)
    first = next(layers)
    gone = weakref.ref(first.mixer.weight_BHTS)
    del first
    gc.collect()
    assert gone() is None
    assert len(list(layers)) == 3


def test_a_row_of_padding_alone_counts_nowhere() -> None:
    """Every row is one run then, as it is where each is one document."""
    model, tokens = hybrid(ffn="moe"), random_tokens(2, 12)
    seq = Layout.from_documents(torch.stack([torch.zeros(12), torch.full((12,), -1)]).long())
    assert seq.whole_rows
    for found, expected in zip(head_patterns(model, tokens, seq), head_patterns(model, tokens[:1]), strict=True):
        for name, each in vars(expected).items():
            assert getattr(found, name) == pytest.approx(each)
    classes = torch.zeros(VOCABULARY, dtype=torch.int64)
    assert load_by_class(model, tokens, classes, seq) == load_by_class(model, tokens[:1], classes)


NO_EDGE = torch.zeros(3, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    "measure",
    [
        head_patterns,
        ablated,
        logit_lens,
        in_context,
        lambda model, tokens, seq: edge_scores(model, tokens, {"no": NO_EDGE}, seq),
        lambda model, tokens, seq: cut_effects(model, tokens, {"no": NO_EDGE}, seq=seq),
        lambda model, tokens, seq: attribution(model, tokens, NO_EDGE, seq=seq),
    ],
)
def test_where_nothing_can_be_measured_a_measure_says_so(measure) -> None:
    with pytest.raises(UsageError, match="there is nothing to measure"):
        measure(build("mha"), random_tokens(1, 3), seq=Layout.from_documents(torch.tensor([[0, 1, 2]])))
