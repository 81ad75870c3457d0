"""Induction on random rows that repeat: who attends to what followed before, and what the model owes to it.

Patterns alone mislead: a head "does induction" where accuracy, hit rate and cut agree (arXiv 2209.11895 has the idea of
induction heads; a linear mixer with a convolution may copy with a score near 0).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swamla.errors import require
from swamla.interpret.ablation import cut_effects
from swamla.interpret.attributing import attribution
from swamla.interpret.patterns import edge_scores, edges_between
from swamla.interpret.tracing import above, in_rows, losses_of
from swamla.model.block import Block
from swamla.model.language_model import NO_LABEL, LanguageModel
from swamla.shares import independent_trials, wilson


@dataclass(frozen=True, kw_only=True)
class LayerInduction:
    """One layer on repeated rows; a number for each head, of the share P of its |weights| that an edge has.

    previous: mean P of the token before, over all tokens.  duplicate: of the same token in the first copy.
    induction: of the token after that.  hit: share of queries whose largest |weight| is that edge.
    conv: how many tokens a value mixes by the layer's convolutions, 1 without any, and half a copy at most.
    induction_conv: mean P of the conv tokens after the same token in the first copy, all of whose values have to do
    with the next one.  hit_conv: share of queries whose largest |weight| is one of these; empty in results of before it
    was measured.
    attribution: what the induction edges add to the right logit, of the sum of |what all edges add| (`attribution`).
    cut: rise of the second copy's loss, in nats a token, when exactly the induction edges of all heads are subtracted
    from the layer's output.  cut_conv: when those of all conv tokens are.  control: the same as cut_conv for as many
    other edges, to the token L // 2 before the query and the conv − 1 after that; one nearer where that would be one of
    the conv.
    """

    previous: tuple[float, ...]
    duplicate: tuple[float, ...]
    induction: tuple[float, ...]
    induction_conv: tuple[float, ...]
    hit: tuple[float, ...]
    attribution: tuple[float, ...]
    conv: int
    cut: float
    cut_conv: float
    control: float
    hit_conv: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Period:
    """Rows whose copies have another length: a head that copies by position, from as far back as copies are long in
    the rows of `Repeats`, does not here.

    accuracy, chance, predictions, interval: as in `Repeats`.  hit_conv: of each layer's heads, as in `LayerInduction`.
    """

    length: int
    accuracy: float
    chance: float
    predictions: int
    interval: tuple[float, float]
    hit_conv: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """A model on rows [start, r, r]. Losses in nats a token, of the tokens 2 … L of each copy of r.

    accuracy: share of the second copy's tokens that have the largest logit.  chance: of guessing among the ids of r.
    predictions: of how many tokens the accuracy is the share, 0 where that is not known.  interval: its Wilson interval
    at 95 %, of as many independent predictions as these are worth (`independent_trials`; of accuracies 0 and 1, which
    do not tell how far rows differ, of all); None where that is not known.  other: copies of another length.
    """

    accuracy: float
    chance: float
    first_loss: float
    second_loss: float
    layers: tuple[LayerInduction, ...]
    predictions: int = 0
    interval: tuple[float, float] | None = None
    other: Period | None = None


def repeated_rows(ids: Sequence[int], start: int | None, *, length: int, rows: int, seed: int = 0) -> Tensor:
    """Tokens (rows, 1 + 2 · length): `start`, then `length` distinct ids drawn from `ids`, then the same again.

    start: what documents begin with; None, for a model that never saw such an id, is one more of `ids` in each row.
    """
    most = len(ids) - (start is None)
    fits = 2 <= length <= most
    require(fits, "length", length, f"must be from 2 to the number of ids, {most}: those of a row are distinct")
    require(0 <= seed < 1 << 63, "seed", seed, "must be >= 0 and below 2^63")
    generator = torch.Generator().manual_seed(seed)
    pool = torch.tensor(ids)
    order = torch.stack([torch.randperm(len(ids), generator=generator)[: length + 1] for _ in range(rows)])
    drawn, others = pool[order[:, :length]], pool[order[:, length:]]
    first = others if start is None else torch.full((rows, 1), start)
    return torch.cat((first, drawn, drawn), dim=1)


def induction(model: LanguageModel, tokens_BT: Tensor) -> Repeats:
    """Measure a model in evaluation mode on rows of `repeated_rows`. Raises as `walk` does."""
    time, device = tokens_BT.shape[1], tokens_BT.device
    length, query_Q, widths = _places(model, tokens_BT)
    after_Q, later_T = query_Q - length + 1, torch.arange(2, time, device=device)
    edges = edges_between(time, query_Q, after_Q)
    others = _others(time, length, query_Q, 1)
    sets = {
        "previous": edges_between(time, later_T, later_T - 1),
        "duplicate": edges_between(time, query_Q, query_Q - length),
        "induction": edges,
        **{str(width): edges_between(time, query_Q, *(after_Q + i for i in range(width))) for width in set(widths)},
    }
    scores = edge_scores(model, tokens_BT, sets)
    attributed = attribution(model, tokens_BT, edges)
    cuts = cut_effects(model, tokens_BT, {"edges": edges, "others": others})
    for width in set(widths) - {1}:
        wide = [index for index, each in enumerate(widths) if each == width]
        both = {"wide": sets[str(width)], "others": _others(time, length, query_Q, width)}
        for index, rises in cut_effects(model, tokens_BT, both, layers=wide).items():
            cuts[index] |= rises
    first, _ = _losses(model, tokens_BT, query_Q - length)
    second, right_B = _losses(model, tokens_BT, query_Q)
    layers = tuple(
        LayerInduction(
            previous=score["previous"].share,
            duplicate=score["duplicate"].share,
            induction=score["induction"].share,
            induction_conv=score[str(width)].share,
            hit_conv=score[str(width)].hit,
            hit=score["induction"].hit,
            attribution=own.score,
            conv=width,
            cut=cuts[index]["edges"],
            cut_conv=cuts[index].get("wide", cuts[index]["edges"]),
            control=cuts[index]["others"],
        )
        for index, (score, own, width) in enumerate(zip(scores, attributed, widths, strict=True))
    )
    return Repeats(
        **_accuracy(right_B, length),
        first_loss=first,
        second_loss=second,
        layers=layers,
    )


def at_another_length(model: LanguageModel, tokens_BT: Tensor) -> Period:
    """Accuracy and hit rates alone, on rows of `repeated_rows`. Raises as `walk` does."""
    length, query_Q, widths = _places(model, tokens_BT)
    sets = {
        str(width): edges_between(tokens_BT.shape[1], query_Q, *(query_Q - length + 1 + i for i in range(width)))
        for width in set(widths)
    }
    scores = edge_scores(model, tokens_BT, sets)
    _, right_B = _losses(model, tokens_BT, query_Q)
    hit_conv = tuple(score[str(width)].hit for score, width in zip(scores, widths, strict=True))
    return Period(length=length, **_accuracy(right_B, length), hit_conv=hit_conv)


def _places(model: LanguageModel, tokens_BT: Tensor) -> tuple[int, Tensor, list[int]]:
    """The length of a copy; the tokens of the second one but the last; how many tokens a value mixes in each layer.

    What follows a query stands `length` − 1 tokens before it. Of a value's tokens half a copy counts at most: as many
    other ones are needed.
    """
    length = (tokens_BT.shape[1] - 1) // 2
    query_Q = torch.arange(length + 1, 2 * length, device=tokens_BT.device)
    return length, query_Q, [min(conv_width(block), length // 2) for block in model.blocks]


def _others(time: int, length: int, query_Q: Tensor, width: int) -> Tensor:
    """As many edges as those to what followed and the width − 1 tokens after that, none of which is one of these.

    Half as far away, or nearer by one where that meets the last of these: a window that has those has these, too.
    """
    back = min(length // 2, length - width - 1)
    return edges_between(time, query_Q, *(query_Q - back + i for i in range(width)))


def _accuracy(right_B: Tensor, length: int) -> dict[str, Any]:
    """Fields of the accuracy. right_B: how many of the length − 1 predictions of each row are right."""
    asked_B = [length - 1] * len(right_B)
    return {"chance": 1 / length, **accuracy_of(right_B.tolist(), asked_B)}


def accuracy_of(right_B: Sequence[int], asked_B: Sequence[int]) -> dict[str, Any]:
    """The accuracy, its number of predictions and its interval, by how many of each row's predictions are right."""
    right, asked = sum(right_B), sum(asked_B)
    trials = independent_trials(right_B, asked_B) if len(asked_B) > 1 and 0 < right < asked else asked
    return {"accuracy": right / asked, "predictions": asked, "interval": wilson(right / asked * trials, trials)}


def conv_width(block: Block) -> int:
    """How many tokens a value mixes by all convolutions of a layer, one behind the other; 1 without any."""
    taps = block.taps()
    before = taps.pop("input").shape[-1] if "input" in taps else 1
    return before + max((each.shape[-1] for each in taps.values()), default=1) - 1


@torch.no_grad()
def _losses(model: LanguageModel, tokens_BT: Tensor, query_Q: Tensor) -> tuple[float, Tensor]:
    """The mean loss of what follows the queries, and in each row how often it has the largest logit (B,)."""
    labels_BT = torch.full_like(tokens_BT, NO_LABEL)
    labels_BT[:, query_Q] = tokens_BT[:, query_Q + 1]
    loss, right = 0.0, []
    for rows in in_rows(model, tokens_BT):
        labels = labels_BT[rows.index]
        x_BTD = above(model, -1, model.at_positions(model.embed(rows.tokens_BT), rows.seq), rows)
        loss += losses_of(model, x_BTD, labels).sum().item()
        best_BQ = model.logits(model.head_input(x_BTD[:, query_Q])).argmax(dim=-1)
        right.append((best_BQ == labels[:, query_Q]).sum(dim=1))
    return loss / (tokens_BT.shape[0] * len(query_Q)), torch.cat(right)
