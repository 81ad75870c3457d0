"""Which experts each class of tokens goes to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from swamla.interpret.tracing import in_rows
from swamla.model.block import Block
from swamla.model.language_model import LanguageModel
from swamla.ops.layout import Layout


@dataclass(frozen=True, kw_only=True)
class ClassLoad:
    """The router of one layer, counted from 0.

    share: for each class, what part of its tokens' choices each expert has: (classes, experts), rows sum to 1, or to 0
        for a class without tokens.
    tokens: how many tokens each class has.
    """

    layer: int
    share: tuple[tuple[float, ...], ...]
    tokens: tuple[int, ...]


@torch.no_grad()
def load_by_class(
    model: LanguageModel, tokens_BT: Tensor, class_V: Tensor, seq: Layout | None = None
) -> tuple[ClassLoad, ...]:
    """The load of every layer whose FFN has a router, bottom first, by classes of tokens (B, T); () without any.

    class_V: the class of each id, from 0; every class up to the largest has a row. Padding counts nowhere. Works for
    every mixer, also one that has no `explain`, and for every FFN whose statistics have "load".
    """
    n_classes = int(class_V.max()) + 1
    loads: dict[int, Tensor] = {}
    counts = torch.zeros(n_classes, dtype=torch.int64)
    for rows in in_rows(model, tokens_BT, seq):
        class_BT = class_V[rows.tokens_BT].masked_fill(~rows.seq.real_BT, -1)
        classes = [class_BT == each for each in range(n_classes)]
        counts += torch.tensor([int(each_BT.sum()) for each_BT in classes])
        x_BTD = model.at_positions(model.embed(rows.tokens_BT), rows.seq)
        for index, block in enumerate(model.blocks):
            mixed_BTD = block.mix(model.layer_input(index, x_BTD, rows.seq, rows.tokens_BT), rows.seq)
            x_BTD, statistics = block.feed(mixed_BTD, rows.seq)
            if "load" in statistics:
                load_CE = torch.stack([_load(block, mixed_BTD, each_BT, statistics["load"]) for each_BT in classes])
                loads[index] = loads.get(index, 0) + load_CE
    return tuple(
        ClassLoad(layer=index, share=_shares(load_CE.double()), tokens=tuple(counts.tolist()))
        for index, load_CE in loads.items()
    )


def _shares(load_CE: Tensor) -> tuple[tuple[float, ...], ...]:
    share_CE = load_CE / load_CE.sum(dim=1, keepdim=True).clamp(min=1)
    return tuple(tuple(each_E) for each_E in share_CE.tolist())


def _load(block: Block, mixed_BTD: Tensor, chosen_BT: Tensor, all_E: Tensor) -> Tensor:
    """(E,): what the router makes of some of the tokens: each is routed by itself."""
    if not chosen_BT.any():
        return torch.zeros_like(all_E)
    row_1ND = mixed_BTD[chosen_BT][None]
    _, statistics = block.feed(row_1ND, Layout.one_document_per_row(1, row_1ND.shape[1], device=row_1ND.device))
    return statistics["load"]
