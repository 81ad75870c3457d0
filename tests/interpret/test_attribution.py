"""Attributions add up to the logit, whatever the mixer, the norm and its place; copying is what eigenvalues say."""

from dataclasses import replace

import pytest
import torch

from swamla.errors import UsageError
from swamla.interpret import copying, edges_between, trace
from swamla.interpret.attributing import attributed, attribution, label_directions
from swamla.interpret.tracing import Rows, layout_of, next_labels
from swamla.model.language_model import NO_LABEL
from swamla.model.mixers.explanation import Weights
from tests.interpret.models import AROUND, EXPLAINED, VOCABULARY, build, hybrid, two_rows
from tests.model.helpers import random_tokens


def all_heads(layer, direction):
    """(B, H, T, S)."""
    return torch.cat(list(attributed(layer, direction)), dim=1)


def centred_logits(model, tokens, seq, labels):
    """The labels' logits less the mean over the vocabulary, (B, T), from the model's own forward pass."""
    with torch.no_grad():
        logits = model.head(model.hidden(tokens, seq)[0])
    return (logits - logits.mean(dim=-1, keepdim=True)).gather(2, labels.clamp(min=0)[..., None])[..., 0]


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm", "dyt"])
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", EXPLAINED)
@torch.no_grad()
def test_attributions_to_all_heads_and_tokens_and_the_rest_of_the_stream_are_the_centred_logit(
    name: str, around: str, norm: str
) -> None:
    model, tokens = build(name, "mha", around=around, norm=norm), random_tokens(2, 20)
    seq, _ = two_rows()
    labels = next_labels(tokens, seq)
    direction = label_directions(model, Rows(index=slice(0, 2), tokens_BT=tokens, seq=seq), labels)
    found = trace(model, tokens, seq)
    heads = sum(all_heads(layer, direction).sum(dim=(1, 3)) for layer in found.layers)
    # The rest: embeddings, what FFNs add, and biases of mixers and of the norms behind them.
    rest = (direction * found.layers[0].before_BTD).sum(-1)
    for layer in found.layers:
        added = layer.mixer.output() if layer.mixer.bias_D is None else layer.mixer.output() - layer.mixer.bias_D
        if layer.norm is not None:
            added = layer.norm.linear(added)
        rest = rest + (direction * (layer.after_BTD - layer.before_BTD - added)).sum(-1)
    head = model.head.weight - model.head.weight.mean(dim=0)
    if model.config.norm.kind != "rmsnorm":
        rest = rest + head[labels.clamp(min=0)] @ model.norm.bias
    there = labels != NO_LABEL
    expected = centred_logits(model, tokens, seq, labels)[there]
    assert expected.abs().max() > 0.1
    torch.testing.assert_close((heads + rest)[there], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", EXPLAINED)
@torch.no_grad()
def test_an_attribution_is_the_fall_of_the_logit_when_the_edge_is_taken_out_of_the_stream_under_frozen_norms(
    name: str,
) -> None:
    """Brute force: zero one weight, recompute the layer's output, and read the changed stream with the old norm."""
    model, tokens = build(name, around="no FFN, convolution"), random_tokens(1, 12)
    whole = layout_of(tokens, None)
    labels = next_labels(tokens, whole)
    direction = label_directions(model, Rows(index=slice(0, 1), tokens_BT=tokens, seq=whole), labels)
    (layer,) = trace(model, tokens).layers
    a = all_heads(layer, direction)
    inverse = layer.after_BTD.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
    head = model.head.weight - model.head.weight.mean(dim=0)

    def logit(stream: torch.Tensor, t: int) -> torch.Tensor:
        return (stream * inverse * model.norm.weight)[0, t] @ head[labels[0, t]]

    for h, t, s in [(0, 10, 9), (1, 10, 10), (1, 7, 0)]:
        weight = layer.mixer.weight_BHTS.clone()
        weight[0, h, t, s] = 0
        without = layer.before_BTD + replace(layer.mixer, weights=Weights.of(weight)).output()
        torch.testing.assert_close(a[0, h, t, s], logit(layer.after_BTD, t) - logit(without, t), rtol=1e-7, atol=1e-10)


@torch.no_grad()
def test_scores_are_sums_over_the_queries_of_every_row() -> None:
    model, tokens = hybrid(), random_tokens(3, 20)
    query = torch.tensor([5, 9, 18])
    edges = edges_between(20, query, query - 3)
    labels = torch.full_like(tokens, NO_LABEL)
    labels[:, query] = random_tokens(3, 3, seed=9)
    labels[1, 5] = NO_LABEL  # no label: no query
    labels[0, 2] = 4  # no edge: no query
    found = attribution(model, tokens, edges, labels)
    there = [(row, t) for row in range(3) for t in (5, 9, 18) if (row, t) != (1, 5)]
    direction = label_directions(model, Rows(index=slice(0, 3), tokens_BT=tokens, seq=layout_of(tokens, None)), labels)
    for layer, scores in zip(trace(model, tokens).layers, found, strict=True):
        a = all_heads(layer, direction)
        aimed = [sum(a[row, h, t, t - 3].item() for row, t in there) for h in range(a.shape[1])]
        size = [sum(a[row, h, t].abs().sum().item() for row, t in there) for h in range(a.shape[1])]
        total = [sum(a[row, h, t].sum().item() for row, t in there) for h in range(a.shape[1])]
        assert scores.score == pytest.approx([x / y for x, y in zip(aimed, size, strict=True)])
        assert scores.logit == pytest.approx([x / 8 for x in aimed])
        assert scores.total == pytest.approx([x / 8 for x in total])
        assert scores.layer == pytest.approx(sum(aimed) / sum(size))


@torch.no_grad()
def test_copying_is_the_sum_of_the_eigenvalues_of_what_attending_to_each_token_says() -> None:
    """By hand for multi-head attention: eigenvalues of the whole (vocabulary, vocabulary) matrix."""
    model = build("mha", norm="layernorm")
    embedded = model.blocks[0].mixer_norm(model.embedding.weight)
    value = (embedded @ model.blocks[0].mixer.qkv_proj.weight[-16:].T).unflatten(1, (2, 8))
    head = model.head.weight - model.head.weight.mean(dim=0)
    (found,) = copying(model)
    for h in range(4):
        out = model.blocks[0].mixer.o_proj.weight[:, 8 * h : 8 * (h + 1)]
        written = value[:, h // 2] @ out.T
        said = (written - written.mean(-1, keepdim=True)) * model.norm.weight @ head.T
        eigenvalues = torch.linalg.eigvals(said)
        assert found[h] == pytest.approx((eigenvalues.real.sum() / eigenvalues.abs().sum()).item(), abs=1e-6)


@torch.no_grad()
def test_a_head_that_writes_what_it_reads_copies_and_one_that_writes_the_opposite_does_not() -> None:
    model = build("mha", tied_head=True)
    mixer, weight = model.blocks[0].mixer, model.blocks[0].mixer.qkv_proj.weight
    model.blocks[0].mixer_norm.weight.fill_(1.0)
    model.norm.weight.fill_(1.0)
    mixer.o_proj.weight[:, :8] = weight[-16:-8].T
    mixer.o_proj.weight[:, 8:16] = -weight[-16:-8].T
    ((copies, opposite, *_),) = copying(model)
    assert copies > 0.95
    assert opposite < -0.95


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", EXPLAINED)
def test_copying_is_between_minus_one_and_one_for_every_mixer(name: str, around: str) -> None:
    model = build(name, "mha", around=around)
    for scores in (copying(model), copying(model, ids=torch.arange(3, VOCABULARY, 2))):
        assert [len(layer) for layer in scores] == [block.mixer.explained_heads for block in model.config.layers]
        assert all(-1 <= score <= 1 for layer in scores for score in layer)


def test_a_norm_of_ones_own_that_is_no_frozen_map_says_so() -> None:
    model, tokens = build("mha", norm="toy_norm"), random_tokens(1, 8)
    with pytest.raises(UsageError, match="has no `frozen`"):
        attribution(model, tokens, edges_between(8, torch.tensor([4]), torch.tensor([2])))
