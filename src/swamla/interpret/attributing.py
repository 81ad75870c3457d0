"""What each head, and each source token, adds to the logit of the right answer: the same for every mixer."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from swamla.interpret.tracing import LayerTrace, Rows, above, in_rows, layout_of, next_labels, some, walk
from swamla.model.block import Block
from swamla.model.language_model import NO_LABEL, LanguageModel
from swamla.model.norm import FrozenNorm
from swamla.ops.layout import Layout


@dataclass(frozen=True, kw_only=True)
class LayerAttribution:
    """One layer: a number for each head. a is what a head adds to a label's logit from one source token.

    score: Σ a over the target edges / Σ |a| over all edges of the queries, in [-1, 1].
    logit: Σ a over the target edges, mean over the queries, in logits.
    total: the same over all edges: what the head adds.
    layer: `score` of all heads together.
    """

    score: tuple[float, ...]
    logit: tuple[float, ...]
    total: tuple[float, ...]
    layer: float


@torch.no_grad()
def attribution(
    model: LanguageModel, tokens_BT: Tensor, edges: Tensor, labels_BT: Tensor | None = None, seq: Layout | None = None
) -> tuple[LayerAttribution, ...]:
    """Direct attribution of the labels' logits to every layer's heads, bottom first.

        a_hts = ⟨f(W_U[y] − mean W_U), W_O^h (gain_ht ⊙ A_hts v_hs)⟩

    f is the final norm, and the norm behind the mixer if there is one, both frozen: what they multiply by at this
    input. Logits are those before `logit_cap`. Effects by way of higher layers are not in a; see `ablation`.

    edges: the target edges, bool (T, S) or (B, T, S), as `edges_between` makes them; queries are the tokens that have
    one, and a label.  labels_BT: what is to be predicted at each token, -100 for none; by default the next token.
    Raises `UsageError` for a mixer or a norm that cannot be taken apart, and without queries.
    """
    seq_BT = layout_of(tokens_BT, seq)
    labels_BT = next_labels(tokens_BT, seq_BT) if labels_BT is None else labels_BT
    edges_BTS = edges.expand(len(tokens_BT), -1, -1)
    labels_BT = torch.where(edges_BTS.any(dim=-1), labels_BT, NO_LABEL)
    sums: dict[int, Tensor] = {}
    for rows in in_rows(model, tokens_BT, seq):
        direction_BTD = label_directions(model, rows, labels_BT[rows.index])
        for index, layer in enumerate(walk(model, rows.tokens_BT, rows.seq)):
            found = [_edge_sums(a_BHTS, edges_BTS[rows.index]) for a_BHTS in attributed(layer, direction_BTD)]
            sums[index] = sums.get(index, 0) + torch.cat(found, dim=1)
    queries = some(int((labels_BT != NO_LABEL).sum()), "label")
    return tuple(_measured(found_3H, queries) for found_3H in sums.values())


def _edge_sums(a_BHTS: Tensor, edges_BTS: Tensor) -> Tensor:
    """(3, H): of the target edges, of all edges' sizes, of all edges."""
    aimed_BHTS = a_BHTS.where(edges_BTS[:, None], 0.0)
    return torch.stack([x.sum(dim=(0, 2, 3), dtype=torch.float64) for x in (aimed_BHTS, a_BHTS.abs(), a_BHTS)])


def label_directions(model: LanguageModel, rows: Rows, labels_BT: Tensor) -> Tensor:
    """(B, T, D): the direction of the last layer's stream along which the label's centred logit grows; 0 without label.

    ⟨direction, stream⟩, plus what a bias of the final norm gives, is the logit before `logit_cap` less the mean logit.
    """
    x_BTD = above(model, -1, model.at_positions(model.embed(rows.tokens_BT), rows.seq), rows)
    row_BTD = _centred_rows(model, labels_BT.clamp(min=0)) * model.output_multiplier
    row_BTD = row_BTD.where((labels_BT != NO_LABEL)[..., None], 0.0)
    return model.config.norm.frozen(model.norm, x_BTD.to(row_BTD.dtype)).transposed(row_BTD)


def _centred_rows(model: LanguageModel, ids: Tensor) -> Tensor:
    """(…, D): rows of the head less the mean of all rows, in fp32 at least."""
    weight_VD = model.head.weight
    dtype = torch.promote_types(weight_VD.dtype, torch.float32)
    return weight_VD[ids].to(dtype) - weight_VD.mean(dim=0, dtype=dtype)


def attributed(layer: LayerTrace, direction_BTD: Tensor) -> Iterator[Tensor]:
    """a (B, h, T, S), blocks of heads: what each edge adds to the stream along the directions (B, T, D)."""
    if layer.norm is not None:
        direction_BTD = layer.norm.transposed(direction_BTD)
    read_BTHV = torch.einsum("btd,hvd->bthv", direction_BTD, layer.mixer.out_HVD)
    if layer.mixer.gain_BTHV is not None:
        read_BTHV = read_BTHV * layer.mixer.gain_BTHV
    for heads, weight_BHTS in layer.mixer.weights.parts():
        value_BSHV = layer.mixer.value_BSHV[:, :, heads]
        yield weight_BHTS * torch.einsum("bthv,bshv->bhts", read_BTHV[:, :, heads], value_BSHV)


def _measured(sums_3H: Tensor, queries: int) -> LayerAttribution:
    aimed_H, size_H, total_H = sums_3H
    return LayerAttribution(
        score=tuple((aimed_H / size_H.clamp(min=1e-30)).tolist()),
        logit=tuple((aimed_H / queries).tolist()),
        total=tuple((total_H / queries).tolist()),
        layer=(aimed_H.sum() / size_H.sum().clamp(min=1e-30)).item(),
    )


@torch.no_grad()
def copying(model: LanguageModel, *, ids: Tensor | None = None) -> tuple[tuple[float, ...], ...]:
    """How much each head, where it looks at a token, raises the logit of that very token: per layer, per head, [-1, 1].

    Σ λ / Σ |λ| over the eigenvalues of M_sy, what attending to the token s alone adds to the logit of y, up to scale
    ("A mathematical framework for transformer circuits", Elhage et al. 2021, "copying heads"): 1 for a head that only
    copies. Values are those of one token's embedding as a document of its own, so lower layers and, of convolutions,
    all taps but the first are left out; gains (gates, norms behind a linear rule) are left out, too.

    ids: of the tokens, (N,); by default the whole vocabulary. Raises `UsageError` as `attribution` does.
    """
    ids = torch.arange(model.config.vocab_size, device=model.device) if ids is None else ids
    tokens_N1 = ids[:, None]
    seq = layout_of(tokens_N1, None)
    x_N1D = model.at_positions(model.embed(tokens_N1), seq)
    unembed_ND = _gains(model.config.norm.frozen(model.norm, torch.ones_like(x_N1D[:1])), _centred_rows(model, ids))
    return tuple(
        _copying_scores(block, model.layer_input(index, x_N1D, seq, tokens_N1), seq, unembed_ND)
        for index, block in enumerate(model.blocks)
    )


def _copying_scores(block: Block, x_N1D: Tensor, seq: Layout, unembed_ND: Tensor) -> tuple[float, ...]:
    explained, _ = block.explain(x_N1D, seq)
    if block.norms_outputs:
        unembed_ND = _gains(block.norm.frozen(block.mixer_norm, torch.ones_like(x_N1D[:1])), unembed_ND)
    # M is value · W_O · W_U, of rank V at most: the product in the other order has the same eigenvalues but zeros.
    inner_HVV = torch.einsum("hvd,nd,nhw->hvw", explained.out_HVD, unembed_ND, explained.value_BSHV[:, 0])
    value_HV = torch.linalg.eigvals(inner_HVV.double())
    return tuple((value_HV.real.sum(dim=1) / value_HV.abs().sum(dim=1).clamp(min=1e-30)).tolist())


def _gains(norm: FrozenNorm, rows_ND: Tensor) -> Tensor:
    """What a norm multiplies by, up to one factor for each token: its gains, and its centring."""
    return norm.transposed(rows_ND[None])[0]
