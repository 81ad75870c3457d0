"""Two finished runs: sums by document, the interval of their difference, and where they differ most."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from swamla.data.shards import Split
from swamla.data.tokenizer import ByteTokenizer, make_tokenizer
from swamla.errors import DataError
from swamla.model.block import BlockConfig
from swamla.model.language_model import LanguageModel, LanguageModelConfig
from swamla.ops.layout import Layout
from swamla.study.evidence import loss_by_position
from swamla.study.two_runs import (
    END,
    document_differences,
    encoded,
    kind_differences,
    paired,
    ratio_interval,
    shares,
    text_losses,
    texts_of,
    token_differences,
)

from .coverage import coverage, drawn, ours, scipys
from .helpers import MIXERS

TEXTS = ["one two three", "Zwölf Boxkämpfer", "a", "the last of these, and the longest of them"]
BYTES = ByteTokenizer()


def split_of(texts: list[str]) -> Split:
    documents = [np.array(BYTES.encode(text), dtype=np.uint16) for text in texts]
    return Split(
        path=Path("texts"),
        tokens=np.concatenate(documents),
        offsets=np.cumsum([0, *map(len, documents)]),
        byte_counts=np.array([len(text.encode()) for text in texts]),
        vocab_size=BYTES.vocab_size,
    )


def model_of(mixer: str) -> LanguageModel:
    torch.manual_seed(0)
    config = LanguageModelConfig(
        vocab_size=BYTES.vocab_size, width=32, blocks={mixer: BlockConfig(mixer=MIXERS[mixer])}, pattern=(mixer,)
    )
    return config.build().eval()


# ---- measurement ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", ["mha", "gdn"])
@pytest.mark.parametrize("block_size", [7, 16, 200])
def test_a_documents_nats_are_those_of_its_pieces_alone(mixer: str, block_size: int) -> None:
    model, split = model_of(mixer), split_of(TEXTS)
    found = text_losses(model, split, eos_id=BYTES.eos_id, block_size=block_size)
    expected, first = [], 0  # the number of the document's first position among all rows
    for text in TEXTS:
        ids = BYTES.encode(text)
        tokens, labels = [BYTES.eos_id, *ids], [*ids, BYTES.eos_id]
        nats, at = 0.0, 0
        while at < len(labels):
            end = min(len(labels), at + block_size - (first + at) % block_size)  # to the end of the row
            piece = torch.tensor([tokens[at:end]])
            logits = model(piece, Layout.from_documents(torch.zeros_like(piece)))[0].detach().double().log_softmax(-1)
            nats -= sum(float(logits[i, label]) for i, label in enumerate(labels[at:end]))
            at = end
        expected.append(nats)
        first += len(labels)
    np.testing.assert_allclose(found.of_documents(split), expected, rtol=2e-5)


def test_losses_by_position_are_the_ones_that_studies_show() -> None:
    model, split = model_of("mha"), split_of(TEXTS)
    found = text_losses(model, split, eos_id=BYTES.eos_id, block_size=16).by_position(16)
    shown = loss_by_position(model, split, eos_id=BYTES.eos_id, block_size=16)
    assert (found.first, found.last, found.tokens) == (shown.first, shown.last, shown.tokens)
    assert found.loss == pytest.approx(shown.loss, rel=1e-6)


def test_progress_ends_with_all_of_the_text() -> None:
    told: list[float] = []
    text_losses(model_of("mha"), split_of(TEXTS), eos_id=BYTES.eos_id, block_size=7, progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 1


# ---- the interval ---------------------------------------------------------------------------------------------------


def test_the_interval_has_the_true_difference_in_95_of_100_texts() -> None:
    assert coverage(40, 400, ours) == pytest.approx(0.95, abs=0.035)  # three times the deviation of 400 texts


def test_of_few_documents_bca_has_it_less_often() -> None:
    assert coverage(10, 200, scipys("BCa")) + 0.02 < coverage(10, 200, ours)


@pytest.mark.parametrize("count", [8, 30])
def test_the_interval_is_that_of_documents_drawn_by_hand(count: int) -> None:
    apart, size = drawn(count, np.random.default_rng(3))
    mean, low, high = ratio_interval(apart, size)
    assert mean == pytest.approx(apart.sum() / size.sum(), rel=1e-12)
    rng, ratios = np.random.default_rng(4), []
    for _ in range(20_000):
        chosen = rng.integers(0, count, count)
        ratios.append(apart[chosen].sum() / size[chosen].sum())
    tail = stats.norm.sf(math.sqrt(count / (count - 1)) * stats.t.isf(0.025, count - 1))
    expected = np.quantile(ratios, [tail, 1 - tail])
    np.testing.assert_allclose([low, high], expected, atol=0.08 * (high - low))


def test_the_figure_is_that_of_the_whole_text_however_it_is_cut_into_documents() -> None:
    bits, size = np.array([30.0, 10.0, 70.0, 2.0]), np.array([10, 8, 20, 1])
    found = paired(bits, bits + np.array([3, -1, 0, 4]), size)
    assert (found.first, found.second) == pytest.approx((112 / 39, 118 / 39))
    assert found.difference.mean == pytest.approx(6 / 39)
    assert (found.count, found.lower, found.higher) == (4, 1, 2)
    assert found.effective == pytest.approx(39**2 / (100 + 64 + 400 + 1))


def test_one_document_has_no_interval_and_equal_runs_have_one_of_no_width() -> None:
    alone = paired(np.array([3.0]), np.array([4.0]), np.array([2]))
    assert tuple(alone.difference) == (0.5, -math.inf, math.inf)
    assert not alone.shown
    same = paired(np.array([3.0, 5.0]), np.array([3.0, 5.0]), np.array([2, 9]))
    assert tuple(same.difference) == (0, 0, 0)
    with pytest.raises(DataError, match="no bytes"):
        paired(np.zeros(2), np.zeros(2), np.zeros(2))


def test_the_same_documents_have_the_same_interval() -> None:
    apart, size = drawn(30, np.random.default_rng(5))
    assert ratio_interval(apart, size) == ratio_interval(apart, size)
    assert ratio_interval(apart, size) != ratio_interval(apart, size, seed=1)


# ---- where they differ most -----------------------------------------------------------------------------------------


def test_tokens_are_shown_in_their_context_the_largest_difference_of_each_first() -> None:
    split = split_of(["abcab", "xbz"])  # labels: a b c a b END x b z END
    first = np.ones(10)
    second = first + np.array([0.5, -3, 0, 2, -1, 0, 0, -4, 0.1, -2])
    better, worse = token_differences(first, second, split, BYTES.decode)
    assert [(each.document, each.position, each.token, each.difference) for each in better] == [
        (1, 1, "b", -4),
        (1, 3, END, -2),
    ]
    assert [(each.document, each.position, each.token) for each in worse] == [(0, 3, "a"), (1, 2, "z")]
    assert (better[0].before, better[0].after) == ("x", "z")
    assert (worse[0].before, worse[0].after) == ("abc", "b")
    assert (worse[0].first, worse[0].second) == (1, 3)
    assert len(token_differences(first, second, split, BYTES.decode, count=1)[0]) == 1


def test_what_a_token_adds_up_to_is_the_sum_over_its_predictions() -> None:
    split, rng = split_of(["abcab", "xbz", "aaa"]), np.random.default_rng(0)
    labels = [*"abcab", END, *"xbz", END, *"aaa", END]
    first, second = rng.random(len(labels)), rng.random(len(labels))
    totals = {name: sum(d for d, label in zip(second - first, labels, strict=True) if label == name) for name in labels}
    better, worse = kind_differences(first, second, split, BYTES.decode, count=20)
    found = {each.token: each.total for each in (*better, *worse)}
    assert found == pytest.approx(totals)
    assert {each.token: each.count for each in (*better, *worse)} == {name: labels.count(name) for name in labels}
    assert [each.total for each in better] == sorted(each.total for each in better)
    assert [each.total for each in worse] == sorted((each.total for each in worse), reverse=True)


def test_documents_that_move_the_total_most_come_first() -> None:
    first, second = np.array([10.0, 20, 30, 40]), np.array([11.0, 15, 30, 80])
    better, worse = document_differences(first, second, np.array([2, 5, 6, 8]), lambda number: f"text {number}")
    assert [(each.document, each.weight, each.first, each.second, each.text) for each in better] == [
        (1, 5, 4.0, 3.0, "text 1")
    ]
    assert [(each.document, each.difference) for each in worse] == [(3, 5.0), (0, 0.5)]


def test_the_curve_of_documents_says_how_much_of_the_text_goes_which_way() -> None:
    apart, size = drawn(500, np.random.default_rng(6))
    points = shares(np.zeros(500), apart, size)
    below = size[apart < 0].sum() / size.sum()
    crossing = max(share for share, value in points if value < 0)
    assert crossing == pytest.approx(below, abs=0.02)
    assert [value for _, value in points] == sorted(value for _, value in points)
    assert len(points) <= 120


# ---- other tokenizers -----------------------------------------------------------------------------------------------


def test_another_tokenizer_gets_the_same_texts() -> None:
    split = split_of(TEXTS)
    other = make_tokenizer("char", ["".join(TEXTS)], ["".join(TEXTS)])
    found = encoded(texts_of(split, BYTES), other, split)
    assert list(texts_of(found, other)) == TEXTS
    assert found.byte_counts.tolist() == split.byte_counts.tolist()
    assert found.vocab_size == other.vocab_size


def test_a_tokenizer_that_cannot_write_the_text_is_refused() -> None:
    split = split_of(TEXTS)
    with pytest.raises(DataError):
        encoded(texts_of(split, BYTES), make_tokenizer("char", ["one two three"], ["one two three"]), split)
