"""How the loss falls with what the model has read, and how much of it the model needs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swamla.errors import require
from swamla.interpret.tracing import Rows, above, in_rows, layout_of, losses_of, next_labels, some
from swamla.model.language_model import NO_LABEL, LanguageModel
from swamla.ops.layout import Layout


@dataclass(frozen=True, kw_only=True)
class LossByPosition:
    """loss: mean in nats of the predictions made at each position of a document (0: of its second token).

    tokens: how many predictions there are; a position without any has a loss of NaN.
    """

    loss: tuple[float, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class InContext:
    """In-context learning (arXiv 2209.11895): how much lower the loss is late in a document than early.

    score: loss at `late` minus loss at `early`, in nats, mean over the documents that are long enough; negative where
        the model uses what it has read.
    error: the standard error of that mean over documents, see `standard_error`; NaN for a single one.
    span: each of the two losses is the mean over so many predictions, of which the one at early or late is the last.
    early, late: positions, 1 for the prediction of a document's second token. late is what the longest document
        allows where that is less than what was asked for, and asked tells what that was.
    texts: of how many texts the documents are pieces.
    """

    score: float
    error: float
    early: int
    late: int
    asked: int
    span: int
    documents: int
    texts: int


@dataclass(frozen=True, kw_only=True)
class BehaviouralContext:
    """How many tokens a model needs for its predictions.

    tokens: the smallest number of last tokens, the current one included, with a loss less than `within` above that of
        all tokens.
    losses: number of last tokens → mean loss in nats, of all numbers that were tried, on the same predictions.
    loss: of all tokens.  longest: how many the longest of these predictions has.
    error: the standard error, over rows (see `standard_error`), of the difference on which the answer rests: the loss
        with `tokens`, or where that is all of them with the next smaller number, minus that with all; NaN for one row.
    """

    tokens: int
    losses: dict[int, float]
    loss: float
    error: float
    within: float
    longest: int


@torch.no_grad()
def losses_by_token(model: LanguageModel, tokens_BT: Tensor, seq: Layout | None = None) -> tuple[Tensor, Tensor]:
    """The loss of each token's next one in nats (B, T), fp64, and where there is one."""
    labels_BT = next_labels(tokens_BT, layout_of(tokens_BT, seq))
    losses = [_losses(model, rows, labels_BT[rows.index]) for rows in in_rows(model, tokens_BT, seq)]
    return torch.cat(losses), labels_BT != NO_LABEL


def loss_by_position(model: LanguageModel, tokens_BT: Tensor, seq: Layout | None = None) -> LossByPosition:
    """The mean loss at each position of the documents of tokens (B, T); seq: the documents, by default one a row."""
    losses_BT, there_BT = losses_by_token(model, tokens_BT, seq)
    position_N = layout_of(tokens_BT, seq).position_BT[there_BT]
    time = tokens_BT.shape[1] - 1
    count_T = torch.bincount(position_N, minlength=time)
    loss_T = torch.bincount(position_N, losses_BT[there_BT], minlength=time) / count_T
    return LossByPosition(loss=tuple(loss_T.tolist()), tokens=tuple(count_T.tolist()))


def in_context(
    model: LanguageModel,
    tokens_BT: Tensor,
    seq: Layout | None = None,
    *,
    early: int = 50,
    late: int = 500,
    span: int = 1,
    texts: Sequence[int] | None = None,
) -> InContext:
    """In-context learning on tokens (B, T) of text; `late` is lowered to what the longest document allows, and said.

    seq: the documents, by default one a row.  span: take means over that many predictions up to early and late, which
    settles the difference with fewer documents.  texts: for each row, which text it is a piece of; by default each is
    of its own. Raises `ConfigError` where no document goes beyond `early`, and `UsageError` where none has two tokens.
    """
    losses_BT, there_BT = losses_by_token(model, tokens_BT, seq)
    position_BT = layout_of(tokens_BT, seq).position_BT
    some(int(there_BT.sum()), "next token")
    last = int(position_BT[there_BT].max()) + 1
    require(
        0 < early < last, "early", early, f"must be from 1 to {last - 1}: the longest document has {last} predictions"
    )
    used = min(late, last)
    require(early < used, "late", late, f"must be more than early = {early}")
    require(0 < span <= early, "span", span, f"must be from 1 to early = {early}")
    late_BT = there_BT & (position_BT == used - 1)
    row_N, time_N = late_BT.nonzero(as_tuple=True)
    back_NX = time_N[:, None] - torch.arange(span, device=time_N.device)
    losses_NX = losses_BT[row_N[:, None], back_NX] - losses_BT[row_N[:, None], back_NX - (used - early)]
    difference_N = losses_NX.mean(dim=1)
    text_N = None if texts is None else torch.tensor(texts, device=row_N.device)[row_N]
    return InContext(
        score=difference_N.mean().item(),
        error=standard_error(difference_N, text_N),
        early=early,
        late=used,
        asked=late,
        span=span,
        documents=len(difference_N),
        texts=len(difference_N) if text_N is None else len(text_N.unique()),
    )


def standard_error(value_N: Tensor, text_N: Tensor | None = None) -> float:
    """Of the mean of values, over their texts where those of one text go together more than by chance.

    text_N: which text each value is of. The larger of the errors over values and over texts (Liang and Zeger 1986);
    values of a single text are taken as independent. NaN for a single value.
    """
    count = len(value_N)
    if count < 2:
        return math.nan
    error = value_N.std().item() / math.sqrt(count)
    if text_N is None or len(text_N.unique()) < 2:
        return error
    _, index_N = text_N.unique(return_inverse=True)
    number = int(index_N.max()) + 1
    sum_G = value_N.new_zeros(number).index_add_(0, index_N, value_N - value_N.mean())
    return max(error, (sum_G.square().sum() * number / (number - 1)).sqrt().item() / count)


@torch.no_grad()
def behavioural_context(
    model: LanguageModel,
    tokens_BT: Tensor,
    *,
    within: float = 0.01,
    queries: int = 16,
    start: int | None = None,
    texts: Sequence[int] | None = None,
) -> BehaviouralContext:
    """The smallest number of last tokens that the model needs, tried by cutting off what is before, on rows (B, T).

    Numbers are doubled until the loss is within `within` nats of that of all tokens, then halved in between: "smallest"
    supposes that losses fall with the number. A number c takes B · queries rows of c tokens. queries: how many
    predictions of each row are tried, spread over its second half.  start: an id put before tokens that are cut off, of
    a model that has learned to see one first; it counts as none of them.  texts: for each row, which text it is a piece
    of; by default each is of its own.
    """
    time = tokens_BT.shape[1]
    require(time >= 3, "length", time, "must be at least 3 tokens a row")
    first = time // 2
    end_Q = (
        torch.linspace(first, time - 2, min(queries, time - 1 - first)).round().long()
    )  # the last token that is read
    longest = int(end_Q.max()) + 1
    losses_BT, _ = losses_by_token(model, tokens_BT)
    whole_B = losses_BT[:, end_Q.to(losses_BT.device)].mean(dim=1)
    loss, text_B = whole_B.mean().item(), None if texts is None else torch.tensor(texts, device=whole_B.device)
    losses, errors = {longest: loss}, {}

    def enough(tokens: int) -> bool:
        loss_B = _loss_of_last(model, tokens_BT, end_Q, tokens, start)
        losses[tokens] = loss_B.mean().item()
        errors[tokens] = standard_error(loss_B - whole_B, text_B)
        return losses[tokens] - loss < within

    low, high = 0, 1  # too few, and perhaps enough
    while high < longest and not enough(high):
        low, high = high, min(2 * high, longest)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return BehaviouralContext(
        tokens=high,
        losses=dict(sorted(losses.items())),
        loss=loss,
        error=errors[high if high in errors else low],
        within=within,
        longest=longest,
    )


def _loss_of_last(model: LanguageModel, tokens_BT: Tensor, end_Q: Tensor, tokens: int, start: int | None) -> Tensor:
    """(B,): the mean loss of the tokens behind `end_Q` when only the last `tokens` of what is before are read."""
    total_B = torch.zeros(len(tokens_BT), dtype=torch.float64, device=tokens_BT.device)
    for end in end_Q.tolist():
        begin = max(0, end + 1 - tokens)
        read_BT = tokens_BT[:, begin : end + 1]
        if start is not None and begin > 0:
            read_BT = torch.cat((torch.full_like(read_BT[:, :1], start), read_BT), dim=1)
        labels_BT = torch.full_like(read_BT, NO_LABEL)
        labels_BT[:, -1] = tokens_BT[:, end + 1]
        for rows in in_rows(model, read_BT):
            total_B[rows.index] += _losses(model, rows, labels_BT[rows.index]).sum(dim=1)
    return total_B / len(end_Q)


def _losses(model: LanguageModel, rows: Rows, labels_BT: Tensor) -> Tensor:
    """(B, T): the loss of each label."""
    return losses_of(
        model, above(model, -1, model.at_positions(model.embed(rows.tokens_BT), rows.seq), rows), labels_BT
    )
