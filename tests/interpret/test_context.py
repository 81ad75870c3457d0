"""Losses by position and by length of context are those of a loop over tokens, on documents and on truncated rows."""

import math
from dataclasses import replace

import pytest
import torch

from swamla.errors import ConfigError
from swamla.interpret import behavioural_context, in_context, loss_by_position
from tests.interpret.models import EXPLAINED, build, hybrid, two_rows
from tests.model.helpers import MIXERS, random_tokens


def loss_of(logits: torch.Tensor, label: torch.Tensor) -> float:
    return -logits.double().log_softmax(-1)[label].item()


@torch.no_grad()
def test_losses_by_position_are_means_over_the_documents_that_are_so_long() -> None:
    model, tokens = hybrid(), random_tokens(2, 20)
    seq, begin = two_rows()
    logits = model(tokens, seq)
    found = loss_by_position(model, tokens, seq)
    at: dict[int, list[float]] = {position: [] for position in range(19)}
    for row in range(2):
        for t in range(19):
            same = begin[row, t] == begin[row, t + 1] and seq.document_BT[row, t + 1] >= 0
            if same:
                at[t - int(begin[row, t])].append(loss_of(logits[row, t], tokens[row, t + 1]))
    assert found.tokens == tuple(len(at[position]) for position in range(19))
    for position, losses in at.items():
        if losses:
            assert found.loss[position] == pytest.approx(sum(losses) / len(losses))
        else:
            assert math.isnan(found.loss[position])


@torch.no_grad()
def test_in_context_learning_is_a_late_loss_less_an_early_one_of_the_same_document() -> None:
    model, tokens = hybrid(), random_tokens(3, 20)
    logits = model(tokens)
    found = in_context(model, tokens, early=4, late=12)
    differences = torch.tensor(
        [loss_of(logits[row, 11], tokens[row, 12]) - loss_of(logits[row, 3], tokens[row, 4]) for row in range(3)],
        dtype=torch.float64,
    )
    assert found.score == pytest.approx(differences.mean().item())
    assert found.error == pytest.approx(differences.std().item() / 3**0.5)
    assert (found.early, found.late, found.asked, found.documents) == (4, 12, 12, 3)


@torch.no_grad()
def test_over_a_span_the_losses_are_means_up_to_early_and_late() -> None:
    model, tokens = hybrid(), random_tokens(2, 20)
    logits = model(tokens)
    means = [
        [sum(loss_of(logits[row, t], tokens[row, t + 1]) for t in range(end - 3, end)) / 3 for end in (4, 12)]
        for row in range(2)
    ]
    found = in_context(model, tokens, early=4, late=12, span=3)
    assert found.score == pytest.approx(sum(late - early for early, late in means) / 2)
    assert found.span == 3
    with pytest.raises(ConfigError, match="span = 5: must be from 1 to early = 4"):
        in_context(model, tokens, early=4, late=12, span=5)


def test_where_no_document_is_long_enough_the_last_position_is_taken_and_said() -> None:
    model, tokens = hybrid(), random_tokens(2, 20)
    found = in_context(model, tokens, early=4)
    assert (found.late, found.asked) == (19, 500)
    seq, _ = two_rows()
    packed = in_context(model, tokens, seq, early=4)
    assert (packed.late, packed.documents) == (14, 1)
    assert math.isnan(packed.error)
    with pytest.raises(ConfigError, match="early = 50: must be from 1 to 18"):
        in_context(model, tokens)
    with pytest.raises(ConfigError, match="late = 4"):
        in_context(model, tokens, early=4, late=4)


@torch.no_grad()
def loss_with(model, tokens, ends, c: int, start: int | None = None) -> float:
    """The mean loss behind tokens `ends` with the last c tokens before them alone, one prediction at a time."""
    losses = []
    for row in tokens:
        for end in ends:
            begin = max(0, end + 1 - c)
            read = row[begin : end + 1]
            if start is not None and begin:
                read = torch.cat((torch.tensor([start]), read))
            losses.append(loss_of(model(read[None])[0, -1], row[end + 1]))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("start", [None, 0])
@pytest.mark.parametrize("name", EXPLAINED)
def test_losses_with_less_context_are_those_of_truncated_rows(name: str, start: int | None) -> None:
    model, tokens = build(name, "mha"), random_tokens(2, 14)
    found = behavioural_context(model, tokens, queries=3, start=start)
    ends = [7, 10, 12]  # spread over the second half
    assert found.longest == 13
    assert found.loss == pytest.approx(loss_with(model, tokens, ends, 14))
    for c, loss in found.losses.items():
        assert loss == pytest.approx(loss_with(model, tokens, ends, c, start)), c
    assert found.losses[found.tokens] - found.loss < 0.01
    below = [loss for c, loss in found.losses.items() if c < found.tokens]
    assert all(loss - found.loss >= 0.01 for loss in below)


@pytest.mark.parametrize(("window", "expected"), [(1, 1), (2, 2), (5, 5), (6, 6), (9, 9)])
def test_a_model_that_cannot_see_beyond_its_window_needs_no_more_than_that(window: int, expected: int) -> None:
    """One layer of a window without sinks: all of the window matters with random weights, nothing else can."""
    model = build("swa", mixers={"swa": replace(MIXERS["swa"], window=window, sinks=0)})
    tokens = random_tokens(4, 30)
    full = loss_with(model, tokens, range(15, 29), 30)
    assert loss_with(model, tokens, range(15, 29), window) == pytest.approx(full)
    found = behavioural_context(model, tokens, within=1e-9)
    assert found.tokens <= expected
    assert found.losses[found.tokens] <= found.loss + 1e-9


def test_a_context_that_is_never_enough_is_all_there_is() -> None:
    found = behavioural_context(build("mha"), random_tokens(2, 14), within=-1e9)
    assert found.tokens == found.longest == 13
    with pytest.raises(ConfigError, match="length = 2"):
        behavioural_context(build("mha"), random_tokens(1, 2))
