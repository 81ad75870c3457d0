"""A forward pass that keeps what every layer did, one layer at a time, and may leave out what some edges add."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from swamla.errors import UsageError
from swamla.model.block import Block
from swamla.model.ffns.ffn import Statistics
from swamla.model.language_model import NO_LABEL, LanguageModel
from swamla.model.mixers.explanation import PART_BYTES, Explanation
from swamla.model.norm import FrozenNorm
from swamla.ops.layout import Layout


@dataclass(frozen=True, kw_only=True)
class LayerTrace:
    """What one layer did. The residual stream (B, T, D) before it, after its mixer and after its FFN.

    mixer: its mixer's output by head and source token.  norm: behind the mixer, frozen; None without one there.
    statistics: of the FFN, such as a router's.
    """

    before_BTD: Tensor
    mixer: Explanation
    norm: FrozenNorm | None
    mixed_BTD: Tensor
    after_BTD: Tensor
    statistics: Statistics


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What every layer did, bottom first, and the next-token logits (B, T, vocabulary)."""

    layers: tuple[LayerTrace, ...]
    logits_BTV: Tensor


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some rows of a batch: which ones, their tokens (B, T), and their documents."""

    index: slice
    tokens_BT: Tensor
    seq: Layout


def walk(model: LanguageModel, tokens_BT: Tensor, seq: Layout | None = None) -> Iterator[LayerTrace]:
    """The layers of `trace` one after the other, bottom first: what is not kept is freed, B · H · T² weights a layer.

    Weights are computed when they are asked for; `mixer.weights.parts()` has them in blocks of heads.

    seq: the documents, by default one a row. In evaluation mode. Raises `UsageError` for a mixer that has no `explain`.
    """
    seq = layout_of(tokens_BT, seq)
    with torch.no_grad():
        x_BTD = model.at_positions(model.embed(tokens_BT), seq)
    for index, block in enumerate(model.blocks):
        with torch.no_grad():
            before_BTD = model.layer_input(index, x_BTD, seq, tokens_BT)
            x_BTD, step = _layer(block, before_BTD, seq)
        yield step.pop()  # no name here keeps it alive


def _layer(block: Block, before_BTD: Tensor, seq: Layout) -> tuple[Tensor, list[LayerTrace]]:
    """The stream behind a layer, and what the layer did."""
    explained, norm = block.explain(before_BTD, seq)
    mixed_BTD = block.with_mixed(before_BTD, explained.output().to(before_BTD.dtype))
    x_BTD, statistics = block.feed(mixed_BTD, seq)
    found = LayerTrace(
        before_BTD=before_BTD, mixer=explained, norm=norm, mixed_BTD=mixed_BTD, after_BTD=x_BTD, statistics=statistics
    )
    return x_BTD, [found]


@torch.no_grad()
def trace(model: LanguageModel, tokens_BT: Tensor, seq: Layout | None = None) -> Trace:
    """The forward pass of tokens (B, T), taken apart; the logits are `model(tokens)`'s to rounding. In evaluation mode.

    seq: the documents, by default one a row. Weights take B · H · T² numbers a layer, all of them at once: `walk` has
    one layer at a time. Raises `UsageError` for a mixer that has no `explain`.
    """
    layers = tuple(walk(model, tokens_BT, seq))
    return Trace(layers=layers, logits_BTV=model.logits(model.head_input(layers[-1].after_BTD)))


@torch.no_grad()
def logits_without(
    model: LanguageModel, tokens_BT: Tensor, cut: Mapping[int, Tensor], seq: Layout | None = None
) -> Tensor:
    """Logits (B, T, vocabulary) when exactly what some edges add to some layers' mixers is subtracted.

    cut: layer → edges, as for `Explanation.cut`; (1, H, 1, 1) for whole heads, without the output's bias. Later layers
    see the changed stream, and so does a norm behind the mixer.
    """
    seq = layout_of(tokens_BT, seq)
    x_BTD = model.at_positions(model.embed(tokens_BT), seq)
    for index, block in enumerate(model.blocks):
        x_BTD = model.layer_input(index, x_BTD, seq, tokens_BT)
        h_BTD = block.mixer_input(x_BTD, seq)
        y_BTD = block.mixer(h_BTD, seq)
        if index in cut:
            y_BTD = y_BTD - block.mixer.explain(h_BTD, seq).cut(cut[index]).to(y_BTD.dtype)
        x_BTD, _ = block.feed(block.with_mixed(x_BTD, y_BTD), seq)
    return model.logits(model.head_input(x_BTD))


@torch.no_grad()
def above(model: LanguageModel, layer: int, x_BTD: Tensor, rows: Rows) -> Tensor:
    """The stream (B, T, D) behind the last layer, of the stream x behind `layer` (-1: embeddings)."""
    for index in range(layer + 1, len(model.blocks)):
        x_BTD, _ = model.blocks[index](model.layer_input(index, x_BTD, rows.seq, rows.tokens_BT), rows.seq)
    return x_BTD


@torch.no_grad()
def losses_of(model: LanguageModel, x_BTD: Tensor, labels_BT: Tensor) -> Tensor:
    """−log p(label) in nats (B, T), fp64, of the stream behind the last layer; 0 where the label is -100."""
    labelled_BT = labels_BT != NO_LABEL
    x_ND, label_N = x_BTD[labelled_BT], labels_BT[labelled_BT]
    losses_N = x_BTD.new_empty(label_N.shape, dtype=torch.float64)
    for some_N in token_parts(model, len(label_N)):
        logits_NV = model.logits(model.head_input(x_ND[some_N])).double()
        losses_N[some_N] = F.cross_entropy(logits_NV, label_N[some_N], reduction="none")
    losses_BT = x_BTD.new_zeros(labels_BT.shape, dtype=torch.float64)
    losses_BT[labelled_BT] = losses_N
    return losses_BT


def token_parts(model: LanguageModel, tokens: int) -> Iterator[slice]:
    """Blocks of tokens whose logits take `PART_BYTES` at most: a single block where all of them fit."""
    size = max(1, PART_BYTES // (8 * model.config.vocab_size))
    return (slice(begin, min(begin + size, tokens)) for begin in range(0, tokens, size))


def layout_of(tokens_BT: Tensor, seq: Layout | None) -> Layout:
    """The documents of the tokens, by default one a row."""
    batch, time = tokens_BT.shape
    return seq or Layout.one_document_per_row(batch, time, device=tokens_BT.device)


def next_labels(tokens_BT: Tensor, seq: Layout) -> Tensor:
    """(B, T): each token's next one in its document, -100 at a document's end and for padding."""
    labels_BT = torch.full_like(tokens_BT, NO_LABEL)
    goes_on_BT = (seq.position_BT[:, 1:] > 0) & seq.real_BT[:, 1:]
    labels_BT[:, :-1] = torch.where(goes_on_BT, tokens_BT[:, 1:], NO_LABEL)
    return labels_BT


def some(count: int, what: str) -> int:
    """The count of what a mean is taken over. Raises `UsageError` for 0."""
    if count == 0:
        raise UsageError(f"no {what} among the tokens: there is nothing to measure")
    return count


def in_rows(
    model: LanguageModel, tokens_BT: Tensor, seq: Layout | None = None, *, max_bytes: int = PART_BYTES
) -> Iterator[Rows]:
    """Blocks of rows so small that one layer's weights, what its heads add, and logits take `max_bytes` each at most.

    A block has one row at least. Where that takes more, measures go on in blocks of heads (`Weights.parts`), and of
    tokens for logits.
    """
    time = tokens_BT.shape[1]
    heads = max(block.mixer.explained_heads for block in model.config.layers)
    row_bytes = 8 * time * max(heads * time, heads * model.config.width, model.config.vocab_size)
    size = max(1, max_bytes // row_bytes)
    for begin in range(0, len(tokens_BT), size):
        index = slice(begin, min(begin + size, len(tokens_BT)))
        whole = seq is None or (seq.whole_rows and not seq.padded)  # a row of padding alone is one run, too
        part = None if whole or seq is None else Layout.from_documents(seq.document_BT[index].cpu())
        yield Rows(
            index=index,
            tokens_BT=tokens_BT[index],
            seq=layout_of(tokens_BT[index], part and part.to(tokens_BT.device)),
        )
