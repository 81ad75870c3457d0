"""Losses by position and by length of context are those of a loop over tokens, on documents and on truncated rows."""

import math
from dataclasses import replace

import pytest
import torch

from swamla.errors import ConfigError
from swamla.interpret import behavioural_context, in_context, loss_by_position
from swamla.interpret.context import standard_error
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
    assert (found.early, found.late, found.asked, found.documents, found.texts) == (4, 12, 12, 3, 3)
    pieces = in_context(model, tokens, early=4, late=12, texts=[7, 2, 7])
    assert pieces.texts == 2
    assert pieces.error == pytest.approx(standard_error(differences, torch.tensor([0, 1, 0])))


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


@pytest.mark.parametrize("within", [0.01, -1e9])
def test_the_error_is_that_of_the_difference_on_which_the_answer_rests(within: float) -> None:
    """Of the loss with so few tokens less that with all, by row; where all are needed, of one fewer than all."""
    model, tokens = build("mha"), random_tokens(5, 14)
    found = behavioural_context(model, tokens, queries=3, within=within, texts=[0, 1, 1, 2, 2])
    few = min(found.tokens, found.longest - 1)
    by_row = [
        loss_with(model, row[None], [7, 10, 12], few) - loss_with(model, row[None], [7, 10, 12], 14) for row in tokens
    ]
    expected = standard_error(torch.tensor(by_row, dtype=torch.float64), torch.tensor([0, 1, 1, 2, 2]))
    assert found.error == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert math.isnan(behavioural_context(model, tokens[:1], queries=3).error)


def test_an_error_over_texts_counts_pieces_that_go_together_once_and_is_never_below_that_over_pieces() -> None:
    generator = torch.Generator().manual_seed(0)
    text, piece = (torch.randn(size, generator=generator, dtype=torch.float64) for size in (300, 1200))
    which = torch.arange(1200) % 300
    plain = standard_error(piece)
    assert plain == pytest.approx(1200**-0.5, rel=0.1)
    assert standard_error(piece, torch.arange(1200)) == pytest.approx(plain)
    assert standard_error(piece, which) >= plain
    assert standard_error(text[which], which) == pytest.approx(300**-0.5, rel=0.1)
    assert standard_error(piece, torch.zeros(1200)) == plain
    assert math.isnan(standard_error(piece[:1]))


@torch.no_grad()
def telling(model, window: int, rows: int, time: int) -> torch.Tensor:
    """Rows of tokens each of which is told by all tokens of a window more than by any fewer."""
    tokens = torch.arange(rows)[:, None] + 1
    while tokens.shape[1] < time:
        *fewer, whole = (model(tokens[:, -c:])[:, -1].log_softmax(dim=-1) for c in range(1, window + 1))
        gain = torch.stack([whole - each for each in fewer]).amin(dim=0) if fewer else whole
        tokens = torch.cat((tokens, gain.argmax(dim=-1)[:, None]), dim=1)
    return tokens


@pytest.mark.parametrize("window", [1, 2, 5, 6, 9])
def test_a_model_needs_as_many_tokens_as_its_window_has_no_more_and_no_fewer(window: int) -> None:
    """One layer of a window without sinks, on tokens that all of the window tells: whatever it does not see costs."""
    model = build("swa", mixers={"swa": replace(MIXERS["swa"], window=window, sinks=0)})
    tokens = telling(model, window, 8, 30)
    full = loss_with(model, tokens, range(15, 29), 30)
    assert loss_with(model, tokens, range(15, 29), window) == pytest.approx(full)
    found = behavioural_context(model, tokens, within=1e-9)
    assert found.tokens == window
    assert found.losses[window] == pytest.approx(found.loss, abs=1e-9)


def test_a_context_that_is_never_enough_is_all_there_is() -> None:
    found = behavioural_context(build("mha"), random_tokens(2, 14), within=-1e9)
    assert found.tokens == found.longest == 13
    with pytest.raises(ConfigError, match="length = 2"):
        behavioural_context(build("mha"), random_tokens(1, 2))
