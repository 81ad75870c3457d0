"""The logit lens: what the model would say if its last layers did nothing (nostalgebraist 2020; arXiv 2303.08112)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from swamla.interpret.tracing import in_rows, layout_of, losses_of, next_labels, some, token_parts
from swamla.model.language_model import NO_LABEL, LanguageModel
from swamla.ops.layout import Layout


@dataclass(frozen=True, kw_only=True)
class LogitLens:
    """The stream before each layer and, last, behind all of them, read by the final norm and the head: N + 1 of them.

    loss: mean in nats a label; the last one is the model's own.
    losses_LBT: of each token, fp64, 0 without a label.
    top_LBTK: the ids of the largest logits, largest first.  probability_LBTK: theirs, fp32.
    """

    loss: tuple[float, ...]
    losses_LBT: Tensor
    top_LBTK: Tensor
    probability_LBTK: Tensor


@torch.no_grad()
def logit_lens(
    model: LanguageModel,
    tokens_BT: Tensor,
    labels_BT: Tensor | None = None,
    seq: Layout | None = None,
    *,
    top: int = 1,
) -> LogitLens:
    """The logit lens on tokens (B, T), on the CPU.

    labels_BT: what is to be predicted at each token, -100 for none; by default the next token.  seq: the documents, by
    default one a row. Works for every mixer, also one that has no `explain`. Raises `UsageError`
    without labels.
    """
    labels_BT = next_labels(tokens_BT, layout_of(tokens_BT, seq)) if labels_BT is None else labels_BT
    losses, tops, probabilities = [], [], []
    for rows in in_rows(model, tokens_BT, seq):
        streams: list[Tensor] = []
        x_BTD = model.at_positions(model.embed(rows.tokens_BT), rows.seq)
        for index, block in enumerate(model.blocks):
            x_BTD = model.layer_input(index, x_BTD, rows.seq, rows.tokens_BT)
            streams.append(x_BTD)
            x_BTD, _ = block(x_BTD, rows.seq)
        streams.append(x_BTD)
        losses.append(torch.stack([losses_of(model, x, labels_BT[rows.index]) for x in streams]).cpu())
        best = [_likeliest(model, x, top) for x in streams]
        tops.append(torch.stack([ids for ids, _ in best]).cpu())
        probabilities.append(torch.stack([probability for _, probability in best]).cpu())
    losses_LBT = torch.cat(losses, dim=1)
    count = some(int((labels_BT != NO_LABEL).sum()), "label")
    return LogitLens(
        loss=tuple((losses_LBT.sum(dim=(1, 2)) / count).tolist()),
        losses_LBT=losses_LBT,
        top_LBTK=torch.cat(tops, dim=1),
        probability_LBTK=torch.cat(probabilities, dim=1),
    )


def _likeliest(model: LanguageModel, x_BTD: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The ids of the largest logits (B, T, K), and their probabilities in fp32."""
    x_ND = x_BTD.flatten(0, 1)
    parts = [
        model.logits(model.head_input(x_ND[some_N])).float().softmax(dim=-1).topk(top, dim=-1)
        for some_N in token_parts(model, len(x_ND))
    ]
    probability_NK, ids_NK = (torch.cat(each) for each in zip(*parts, strict=True))
    return ids_NK.unflatten(0, x_BTD.shape[:2]), probability_NK.unflatten(0, x_BTD.shape[:2])
