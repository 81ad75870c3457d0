"""Induction on random rows that repeat: who attends to what followed before, and what the model owes to it.

Patterns alone mislead: a head "does induction" where accuracy, hit rate and cut agree (arXiv 2209.11895 has the idea of
induction heads; a linear mixer with a convolution may copy with a score near 0).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swamla.errors import require
from swamla.interpret.ablation import cut_effects
from swamla.interpret.attributing import attribution
from swamla.interpret.patterns import edge_scores, edges_between
from swamla.interpret.tracing import above, in_rows, losses_of
from swamla.model.block import Block
from swamla.model.language_model import NO_LABEL, LanguageModel


@dataclass(frozen=True, kw_only=True)
class LayerInduction:
    """One layer on repeated rows; a number for each head, of the share P of its |weights| that an edge has.

    previous: mean P of the token before, over all tokens.  duplicate: of the same token in the first copy.
    induction: of the token after that.  hit: share of queries whose largest |weight| is that edge.
    conv: how many tokens a value mixes by the layer's convolutions, 1 without any.  induction_conv: mean P of the conv
    tokens after the same token in the first copy, all of whose values have to do with the next one.
    attribution: what the induction edges add to the right logit, of the sum of |what all edges add| (`attribution`).
    cut: rise of the second copy's loss, in nats a token, when exactly the induction edges of all heads are subtracted
    from the layer's output.  cut_conv: when those of all conv tokens are.  control: the same as cut_conv for as many
    other edges, to the token L // 2 before the query and the conv − 1 after that.
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


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """A model on rows [start, r, r]. Losses in nats a token, of the tokens 2 … L of each copy of r.

    accuracy: share of the second copy's tokens that have the largest logit.  chance: of guessing among the ids of r.
    """

    accuracy: float
    chance: float
    first_loss: float
    second_loss: float
    layers: tuple[LayerInduction, ...]


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
    length = (time - 1) // 2
    # Tokens of the second copy but the last: what follows each of them stands `length` − 1 tokens before it.
    query_Q = torch.arange(length + 1, 2 * length, device=device)
    after_Q, later_T = query_Q - length + 1, torch.arange(2, time, device=device)
    edges = edges_between(time, query_Q, after_Q)
    # One other token for each query, half as far away: a window that has the induction edges has these, too.
    others = edges_between(time, query_Q, query_Q - length // 2)
    widths = [min(conv_width(block), length) for block in model.blocks]
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
        beside = edges_between(time, query_Q, *(query_Q - length // 2 + i for i in range(width)))
        both = {"wide": sets[str(width)], "others": beside}
        for index, rises in cut_effects(model, tokens_BT, both, layers=wide).items():
            cuts[index] |= rises
    first, _ = _losses(model, tokens_BT, query_Q - length)
    second, accuracy = _losses(model, tokens_BT, query_Q)
    layers = tuple(
        LayerInduction(
            previous=score["previous"].share,
            duplicate=score["duplicate"].share,
            induction=score["induction"].share,
            induction_conv=score[str(width)].share,
            hit=score["induction"].hit,
            attribution=own.score,
            conv=width,
            cut=cuts[index]["edges"],
            cut_conv=cuts[index].get("wide", cuts[index]["edges"]),
            control=cuts[index]["others"],
        )
        for index, (score, own, width) in enumerate(zip(scores, attributed, widths, strict=True))
    )
    return Repeats(accuracy=accuracy, chance=1 / length, first_loss=first, second_loss=second, layers=layers)


def conv_width(block: Block) -> int:
    """How many tokens a value mixes by all convolutions of a layer, one behind the other; 1 without any."""
    taps = block.taps()
    before = taps.pop("input").shape[-1] if "input" in taps else 1
    return before + max((each.shape[-1] for each in taps.values()), default=1) - 1


@torch.no_grad()
def _losses(model: LanguageModel, tokens_BT: Tensor, query_Q: Tensor) -> tuple[float, float]:
    """The mean loss of what follows the queries, and how often it has the largest logit."""
    labels_BT = torch.full_like(tokens_BT, NO_LABEL)
    labels_BT[:, query_Q] = tokens_BT[:, query_Q + 1]
    loss = right = 0.0
    for rows in in_rows(model, tokens_BT):
        labels = labels_BT[rows.index]
        x_BTD = above(model, -1, model.at_positions(model.embed(rows.tokens_BT), rows.seq), rows)
        loss += losses_of(model, x_BTD, labels).sum().item()
        best_BQ = model.logits(model.head_input(x_BTD[:, query_Q])).argmax(dim=-1)
        right += (best_BQ == labels[:, query_Q]).sum().item()
    count = tokens_BT.shape[0] * len(query_Q)
    return loss / count, right / count
