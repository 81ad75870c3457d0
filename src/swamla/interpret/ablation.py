"""What the loss owes to edges, heads, mixers and FFNs: each is left out, and the layers above see what is missing."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from swamla.interpret.tracing import LayerTrace, Rows, above, in_rows, layout_of, losses_of, next_labels, some, walk
from swamla.model.block import Block
from swamla.model.language_model import NO_LABEL, LanguageModel
from swamla.ops.layout import Layout


@dataclass(frozen=True, kw_only=True)
class LayerAblation:
    """Rises of the mean loss, in nats a label, without parts of one layer.

    heads: without one head's output; it underestimates where heads stand in for each other. Biases stay.
    mixer: without what the mixer adds to the stream; it overestimates, since layers above never saw such a stream.
    ffn: the same of the FFN; 0 where there is none.
    """

    heads: tuple[float, ...]
    mixer: float
    ffn: float


@dataclass(frozen=True, kw_only=True)
class Ablated:
    """loss: of the whole model, mean in nats a label.  layers: bottom first."""

    loss: float
    layers: tuple[LayerAblation, ...]


@torch.no_grad()
def ablated(
    model: LanguageModel, tokens_BT: Tensor, labels_BT: Tensor | None = None, seq: Layout | None = None
) -> Ablated:
    """Leave out every head, mixer and FFN in turn, on tokens (B, T).

    labels_BT: what is to be predicted at each token, -100 for none; by default the next token.  seq: the documents, by
    default one a row. Takes about (heads + 2) / 2 forward passes a layer. Raises `UsageError` as `walk` does,
    and without labels.
    """
    labels_BT = next_labels(tokens_BT, layout_of(tokens_BT, seq)) if labels_BT is None else labels_BT
    sums: dict[int, Tensor] = {}
    base = 0.0
    for rows in in_rows(model, tokens_BT, seq):
        labels = labels_BT[rows.index]
        for index, layer in enumerate(walk(model, rows.tokens_BT, rows.seq)):
            streams = _ablated_streams(model.blocks[index], layer, rows.seq)
            found = [losses_of(model, above(model, index, x_BTD, rows), labels).sum() for x_BTD in streams]
            sums[index] = sums.get(index, 0) + torch.stack(found)
        base += losses_of(model, layer.after_BTD, labels).sum().item()
    count = some(int((labels_BT != NO_LABEL).sum()), "label")
    layers = []
    for sums_N in sums.values():
        *heads, mixer, ffn = ((sums_N - base) / count).tolist()
        layers.append(LayerAblation(heads=tuple(heads), mixer=mixer, ffn=ffn))
    return Ablated(loss=base / count, layers=tuple(layers))


def _ablated_streams(block: Block, layer: LayerTrace, seq: Layout) -> Iterator[Tensor]:
    """The stream behind a layer without each head, without the mixer, without the FFN."""
    whole_BTD = layer.mixer.output()
    for added_BThD in layer.mixer.contribution_parts():
        for added_BTD in added_BThD.unbind(dim=2):
            mixed_BTD = block.with_mixed(layer.before_BTD, (whole_BTD - added_BTD).to(layer.before_BTD.dtype))
            yield block.feed(mixed_BTD, seq)[0]
    yield block.feed(layer.before_BTD, seq)[0]
    yield layer.mixed_BTD


@torch.no_grad()
def cut_effects(
    model: LanguageModel,
    tokens_BT: Tensor,
    edges: Mapping[str, Tensor],
    labels_BT: Tensor | None = None,
    seq: Layout | None = None,
    *,
    layers: Collection[int] | None = None,
) -> dict[int, dict[str, float]]:
    """What the loss owes to some sets of edges, one set of one layer at a time: layer → name → rise.

    A rise is that of the mean loss, in nats a label, when exactly these edges of all heads are subtracted from the
    layer's mixer. Give as many other edges as a control.

    edges: bool, (T, S) or (B, T, S), as for `Explanation.cut`.  labels_BT: what is to be predicted at each token, -100
    for none; by default the next token, of the tokens that have an edge in one of the sets.  layers: all by default.
    Raises `UsageError` as `walk` does, and without labels.
    """
    sets = {name: each.expand(len(tokens_BT), -1, -1) for name, each in edges.items()}
    if labels_BT is None:
        queries_BT = torch.stack([each.any(dim=-1) for each in sets.values()]).any(dim=0)
        labels_BT = torch.where(queries_BT, next_labels(tokens_BT, layout_of(tokens_BT, seq)), NO_LABEL)
    sums: dict[int, Tensor] = {}
    base = 0.0
    for rows in in_rows(model, tokens_BT, seq):
        labels = labels_BT[rows.index]
        for index, layer in enumerate(walk(model, rows.tokens_BT, rows.seq)):
            if layers is None or index in layers:
                streams = (_cut_stream(model.blocks[index], layer, each[rows.index], rows) for each in sets.values())
                found = [losses_of(model, above(model, index, x_BTD, rows), labels).sum() for x_BTD in streams]
                sums[index] = sums.get(index, 0) + torch.stack(found)
        base += losses_of(model, layer.after_BTD, labels).sum().item()
    count = some(int((labels_BT != NO_LABEL).sum()), "label")
    return {index: dict(zip(sets, ((found - base) / count).tolist(), strict=True)) for index, found in sums.items()}


def _cut_stream(block: Block, layer: LayerTrace, edges_BTS: Tensor, rows: Rows) -> Tensor:
    """The stream behind a layer without what these edges add to its mixer's output."""
    y_BTD = (layer.mixer.output() - layer.mixer.cut(edges_BTS)).to(layer.before_BTD.dtype)
    return block.feed(block.with_mixed(layer.before_BTD, y_BTD), rows.seq)[0]
