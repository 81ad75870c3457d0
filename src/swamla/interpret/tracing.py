"""A forward pass that keeps what every layer did, and may leave out what some edges add."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from swamla.model.ffns.ffn import Statistics
from swamla.model.language_model import LanguageModel
from swamla.model.mixers.explanation import Explanation
from swamla.ops.layout import Layout


@dataclass(frozen=True, kw_only=True)
class LayerTrace:
    """What one layer did. The residual stream (B, T, D) before it, after its mixer and after its FFN.

    mixer: its mixer's output by head and source token.  statistics: of the FFN, such as a router's.
    """

    before_BTD: Tensor
    mixer: Explanation
    mixed_BTD: Tensor
    after_BTD: Tensor
    statistics: Statistics


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What every layer did, bottom first, and the next-token logits (B, T, vocabulary)."""

    layers: tuple[LayerTrace, ...]
    logits_BTV: Tensor


@torch.no_grad()
def trace(model: LanguageModel, tokens_BT: Tensor, seq: Layout | None = None) -> Trace:
    """The forward pass of tokens (B, T), taken apart; the logits are `model(tokens)`'s to rounding. In evaluation mode.

    seq: the documents, by default one a row. Weights take B · H · T² numbers a layer. Raises `UsageError` for a mixer
    that has no `explain`.
    """
    batch, time = tokens_BT.shape
    seq = seq or Layout.one_document_per_row(batch, time, device=tokens_BT.device)
    layers: list[LayerTrace] = []
    x_BTD = model.at_positions(model.embed(tokens_BT), seq)
    for index, block in enumerate(model.blocks):
        before_BTD = model.layer_input(index, x_BTD, seq, tokens_BT)
        explained = block.mixer.explain(block.mixer_input(before_BTD, seq), seq)
        mixed_BTD = block.with_mixed(before_BTD, explained.output().to(before_BTD.dtype))
        x_BTD, statistics = block.feed(mixed_BTD, seq)
        layers.append(
            LayerTrace(
                before_BTD=before_BTD, mixer=explained, mixed_BTD=mixed_BTD, after_BTD=x_BTD, statistics=statistics
            )
        )
    return Trace(layers=tuple(layers), logits_BTV=model.logits(model.head_input(x_BTD)))


@torch.no_grad()
def logits_without(
    model: LanguageModel, tokens_BT: Tensor, cut: Mapping[int, Tensor], seq: Layout | None = None
) -> Tensor:
    """Logits (B, T, vocabulary) when exactly what some edges add to some layers' mixers is subtracted.

    cut: layer → edges, as for `Explanation.cut`. Later layers see the changed stream.
    """
    batch, time = tokens_BT.shape
    seq = seq or Layout.one_document_per_row(batch, time, device=tokens_BT.device)
    x_BTD = model.at_positions(model.embed(tokens_BT), seq)
    for index, block in enumerate(model.blocks):
        x_BTD = model.layer_input(index, x_BTD, seq, tokens_BT)
        h_BTD = block.mixer_input(x_BTD, seq)
        y_BTD = block.mixer(h_BTD, seq)
        if index in cut:
            y_BTD = y_BTD - block.mixer.explain(h_BTD, seq).cut(cut[index]).to(y_BTD.dtype)
        x_BTD, _ = block.feed(block.with_mixed(x_BTD, y_BTD), seq)
    return model.logits(model.head_input(x_BTD))
