"""Induction on random rows that repeat: who attends to what followed before, and what the model owes to it.

Patterns alone mislead: a head "does induction" where accuracy, hit rate and cut agree (arXiv 2209.11895 has the idea of
induction heads; a linear mixer with a convolution may copy with a score near 0).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swamla.errors import require
from swamla.interpret.tracing import logits_without, trace
from swamla.model.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class LayerInduction:
    """One layer on repeated rows; a number for each head, of the share P of its |weights| that an edge has.

    previous: mean P of the token before, over all tokens.  duplicate: of the same token in the first copy.
    induction: of the token after that.  hit: share of queries whose largest |weight| is that edge.
    cut: rise of the second copy's loss, in nats a token, when exactly the induction edges of all heads are subtracted
    from the layer's output.  control: the same for as many other edges.
    """

    previous: tuple[float, ...]
    duplicate: tuple[float, ...]
    induction: tuple[float, ...]
    hit: tuple[float, ...]
    cut: float
    control: float


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """A model on rows [start, r, r]. Losses in nats a token, of the tokens 2 … L of each copy of r.

    accuracy: share of the second copy's tokens that have the largest logit.
    """

    accuracy: float
    first_loss: float
    second_loss: float
    layers: tuple[LayerInduction, ...]


def repeated_rows(ids: Sequence[int], start: int, *, length: int, rows: int, seed: int = 0) -> Tensor:
    """Tokens (rows, 1 + 2 · length): `start`, then `length` distinct ids drawn from `ids`, then the same again."""
    fits = 2 <= length <= len(ids)
    require(fits, "length", length, f"must be from 2 to the number of ids, {len(ids)}: those of a row are distinct")
    generator = torch.Generator().manual_seed(seed)
    pool = torch.tensor(ids)
    drawn = torch.stack([pool[torch.randperm(len(ids), generator=generator)[:length]] for _ in range(rows)])
    return torch.cat((torch.full((rows, 1), start), drawn, drawn), dim=1)


@torch.no_grad()
def induction(model: LanguageModel, tokens_BT: Tensor) -> Repeats:
    """Measure a model in evaluation mode on rows of `repeated_rows`. Raises as `trace` does."""
    length = (tokens_BT.shape[1] - 1) // 2
    # Tokens of the second copy but the last: what follows each of them stands `length` − 1 tokens before it.
    query_Q = torch.arange(length + 1, 2 * length)
    found = trace(model, tokens_BT)
    first, _ = _losses(found.logits_BTV, tokens_BT, query_Q - length)
    second, accuracy = _losses(found.logits_BTV, tokens_BT, query_Q)
    layers = []
    for index, layer in enumerate(found.layers):
        weight_BHTS = layer.mixer.weight_BHTS.abs()
        share_BHTS = weight_BHTS / weight_BHTS.sum(dim=-1, keepdim=True).clamp(min=1e-30)
        after = share_BHTS[:, :, query_Q, query_Q - length + 1]
        edges, others = (torch.zeros(tokens_BT.shape[1:] * 2, dtype=torch.bool) for _ in range(2))
        edges[query_Q, query_Q - length + 1] = True
        others[query_Q, (query_Q - length) // 2] = True  # one other token of the first copy for each query
        rises = [
            _losses(logits_without(model, tokens_BT, {index: cut}), tokens_BT, query_Q)[0] for cut in (edges, others)
        ]
        time = torch.arange(2, tokens_BT.shape[1])
        layers.append(
            LayerInduction(
                previous=_by_head(share_BHTS[:, :, time, time - 1]),
                duplicate=_by_head(share_BHTS[:, :, query_Q, query_Q - length]),
                induction=_by_head(after),
                hit=_by_head((weight_BHTS[:, :, query_Q].argmax(dim=-1) == query_Q - length + 1).double()),
                cut=rises[0] - second,
                control=rises[1] - second,
            )
        )
    return Repeats(accuracy=accuracy, first_loss=first, second_loss=second, layers=tuple(layers))


def _losses(logits_BTV: Tensor, tokens_BT: Tensor, query_Q: Tensor) -> tuple[float, float]:
    """The mean loss of what follows the queries, and how often it has the largest logit."""
    logits_BQV, next_BQ = logits_BTV[:, query_Q].double(), tokens_BT[:, query_Q + 1]
    losses = -logits_BQV.log_softmax(dim=-1).gather(2, next_BQ[..., None])
    return losses.mean().item(), (logits_BQV.argmax(dim=-1) == next_BQ).double().mean().item()


def _by_head(x_BHQ: Tensor) -> tuple[float, ...]:
    return tuple(x_BHQ.double().mean(dim=(0, 2)).tolist())
