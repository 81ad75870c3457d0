"""What heads look at: measures of the shares P = |A| / Σ|A| of their weights, for softmax and linear mixers alike.

Patterns alone mislead: a convolution before a mixer mixes earlier tokens into what a head takes of a later one (its
filters are `model.blocks[i].taps()`), and signed weights are no distribution. See `ablation` for what heads are for.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from swamla.interpret.tracing import in_rows, some, walk
from swamla.model.language_model import LanguageModel
from swamla.model.mixers.explanation import Weights
from swamla.ops.layout import Layout


@dataclass(frozen=True, kw_only=True)
class HeadPatterns:
    """One layer on a text: a number for each head, of all tokens but each document's first ones.

    previous: mean share of the token before.
    sink: mean share of the document's first `sinks` tokens. A learned sink takes none: it is no token.
    entropy: mean of −Σ P log P / log(number of tokens so far), 0 for one token, 1 for all of them equally.
    effective_context: the smallest D such that the D nearest tokens, the token itself included, have .9 of the shares
        that are not the sinks', summed over all tokens; at most the longest document. 0 where sinks have everything.
    """

    previous: tuple[float, ...]
    sink: tuple[float, ...]
    entropy: tuple[float, ...]
    effective_context: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class EdgeScores:
    """A set of edges in one layer: a number for each head, of all queries, which are the tokens that have edges.

    share: mean share of a query's edges together.  hit: how often a query's largest |weight| is one of its edges.
    """

    share: tuple[float, ...]
    hit: tuple[float, ...]


def head_patterns(
    model: LanguageModel, tokens_BT: Tensor, seq: Layout | None = None, *, sinks: int = 1, mass: float = 0.9
) -> tuple[HeadPatterns, ...]:
    """The patterns of every layer's heads, bottom first, on tokens (B, T).

    seq: the documents, by default one a row.  sinks: how many first tokens of a document count as such.  mass: what
    `effective_context` must hold. Raises `UsageError` as `walk` does, and without any second token.
    """
    sums: dict[int, _PatternSums] = {}
    for rows in in_rows(model, tokens_BT, seq):
        for index, layer in enumerate(walk(model, rows.tokens_BT, rows.seq)):
            own = sums.setdefault(index, _PatternSums(layer.mixer.weights, layer.before_BTD.device, sinks))
            own.add(layer.mixer.weights, rows.seq)
    return tuple(own.measured(mass) for own in sums.values())


class _PatternSums:
    """Sums over tokens, so that rows can come one block after the other."""

    def __init__(self, weights: Weights, device: torch.device, sinks: int) -> None:
        _, heads, time, _ = weights.shape
        self.sinks, self.count = sinks, 0
        zeros_3H = torch.zeros(3, heads, dtype=torch.float64, device=device)
        self.previous_H, self.sink_H, self.entropy_H = zeros_3H
        self.near_HD = torch.zeros(heads, time, dtype=torch.float64, device=device)

    def add(self, weights: Weights, seq: Layout) -> None:
        later_BT = (seq.position_BT > 0) & seq.real_BT
        self.count += int(later_BT.sum())
        for heads, weight_BHTS in weights.parts():
            self._add(heads, shares(weight_BHTS).where(later_BT[:, None, :, None], 0.0), seq)

    def _add(self, heads: slice, share_BHTS: Tensor, seq: Layout) -> None:
        index_T = torch.arange(seq.shape[1], device=share_BHTS.device)
        before = share_BHTS.diagonal(offset=-1, dim1=2, dim2=3)
        self.previous_H[heads] += before.sum(dim=(0, 2), dtype=torch.float64)
        is_sink_BS = (seq.position_BT < self.sinks)[:, None, None, :]
        self.sink_H[heads] += share_BHTS.where(is_sink_BS, 0.0).sum(dim=(0, 2, 3), dtype=torch.float64)
        entropy_BHT = torch.special.entr(share_BHTS).sum(dim=-1)
        most_BT = (seq.position_BT.clamp(min=1) + 1).double().log()
        self.entropy_H[heads] += (entropy_BHT / most_BT[:, None]).sum(dim=(0, 2), dtype=torch.float64)
        away_TS = (index_T[:, None] - index_T).clamp(min=0)  # later tokens have shares of 0
        distant_HTS = share_BHTS.where(~is_sink_BS, 0.0).sum(dim=0, dtype=torch.float64)
        self.near_HD[heads].scatter_add_(1, away_TS.flatten().expand(len(distant_HTS), -1), distant_HTS.flatten(1))

    def measured(self, mass: float) -> HeadPatterns:
        count = some(self.count, "second token")
        within_HD = self.near_HD.cumsum(dim=1)
        total_H1 = within_HD[:, -1:]
        context_H = torch.where(total_H1[:, 0] > 0, (within_HD < mass * total_H1).sum(dim=1) + 1, 0)
        return HeadPatterns(
            previous=tuple((self.previous_H / count).tolist()),
            sink=tuple((self.sink_H / count).tolist()),
            entropy=tuple((self.entropy_H / count).tolist()),
            effective_context=tuple(context_H.tolist()),
        )


def edge_scores(
    model: LanguageModel, tokens_BT: Tensor, edges: Mapping[str, Tensor], seq: Layout | None = None
) -> tuple[dict[str, EdgeScores], ...]:
    """Every layer's scores of some sets of edges, by their names, on tokens (B, T).

    edges: bool, (T, S) for all rows or (B, T, S); `edges_between` makes them. Raises `UsageError` as `walk` does,
    and for a set without edges.
    """
    sums: dict[int, dict[str, Tensor]] = {}
    counts = dict.fromkeys(edges, 0)
    for rows in in_rows(model, tokens_BT, seq):
        mine = {name: each.expand(len(tokens_BT), -1, -1)[rows.index] for name, each in edges.items()}
        for name, edges_BTS in mine.items():
            counts[name] += int(edges_BTS.any(dim=-1).sum())
        for index, layer in enumerate(walk(model, rows.tokens_BT, rows.seq)):
            found = _edge_sums(layer.mixer.weights, mine)
            own = sums.setdefault(index, {name: torch.zeros_like(each) for name, each in found.items()})
            for name, sums_2H in found.items():
                own[name] += sums_2H
    for name, count in counts.items():
        some(count, f"edge of {name!r}")
    return tuple(
        {
            name: EdgeScores(share=tuple((share / counts[name]).tolist()), hit=tuple((hit / counts[name]).tolist()))
            for name, (share, hit) in layer.items()
        }
        for layer in sums.values()
    )


def _edge_sums(weights: Weights, edges: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """(2, H) of each set: the sum of shares over all queries, and the number of hits."""
    found: dict[str, list[Tensor]] = {name: [] for name in edges}
    for _, weight_BHTS in weights.parts():
        share_BHTS = shares(weight_BHTS)
        largest_BHT1 = share_BHTS.argmax(dim=-1, keepdim=True)
        for name, edges_BTS in edges.items():
            edges_BHTS = edges_BTS[:, None].expand(share_BHTS.shape)
            share_H = share_BHTS.where(edges_BHTS, 0.0).sum(dim=(0, 2, 3), dtype=torch.float64)
            hit_H = edges_BHTS.gather(3, largest_BHT1).sum(dim=(0, 2, 3)).double()
            found[name].append(torch.stack((share_H, hit_H)))
    return {name: torch.cat(parts, dim=1) for name, parts in found.items()}


def shares(weight_BHTS: Tensor) -> Tensor:
    """P (B, H, T, S) = |A| / Σ_s |A|, in fp32 at least; 0 where a token takes nothing of any other."""
    weight_BHTS = weight_BHTS.abs()
    return weight_BHTS / weight_BHTS.sum(dim=-1, keepdim=True).clamp(min=1e-30)


def edges_between(time: int, query_Q: Tensor, *source_Q: Tensor) -> Tensor:
    """Edges from tokens query[q] to tokens source[q], for one or several sources of each: bool (T, T) of T = `time`.

    (B, Q) queries and sources, for rows that differ, give (B, T, T).
    """
    edges = torch.zeros(*query_Q.shape[:-1], time, time, dtype=torch.bool, device=query_Q.device)
    for each_Q in source_Q:
        if query_Q.ndim == 1:
            edges[query_Q, each_Q] = True
        else:
            row_B1 = torch.arange(len(query_Q), device=query_Q.device)[:, None]
            edges[row_B1, query_Q, each_Q] = True
    return edges
