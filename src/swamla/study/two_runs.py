"""Two finished runs on the same documents, or on the same rows of a task: measurement and statistics.

What two runs predict is compared document by document. The figure is a ratio of sums over documents, such as bits over
bytes, so that it equals the figure of the whole text; its interval resamples documents, each with both runs' losses.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from swamla.data.packing import NO_LABEL, Batch, HeldOutRows
from swamla.data.shards import Split, pieces, token_dtype
from swamla.data.tokenizer import Tokenizer
from swamla.errors import DataError, require
from swamla.interpret.sections import Positions
from swamla.model.language_model import LanguageModel
from swamla.ops.layout import Layout
from swamla.study.evidence import LOGIT_BYTES, by_powers
from swamla.study.statistics import LEVEL, Interval, scipy_stats

RESAMPLES, FEWEST = 9999, 1999  # of the bootstrap; fewer of many documents
DRAWS = 50_000_000  # documents that all resamples draw together, beyond which they are fewer
AT_ONCE = 5_000_000  # drawn together, which bounds the memory
BEFORE, AFTER = 40, 16  # tokens of context that are shown of a prediction, at most
SHOWN_BEFORE, SHOWN_AFTER = 90, 40  # and characters of them
BEGINNING = 160  # characters of a document that are shown
END = "end of document"


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Losses of a model on a split: of its labels in order, those of a document followed by its end.

    nats_N: float64.  position_N: tokens of the document that were read before, from 0; a row forgets the row before.
    """

    nats_N: np.ndarray
    position_N: np.ndarray

    def of_documents(self, split: Split) -> np.ndarray:
        """Nats of each document, its end included, float64 (n_documents)."""
        return np.add.reduceat(self.nats_N, starts_of(split))

    def by_position(self, block_size: int) -> Positions:
        """Losses where 1, 2, 3–4, 5–8 … tokens of the document were read."""
        sums = np.bincount(self.position_N, self.nats_N, minlength=block_size)
        counts = np.bincount(self.position_N, minlength=block_size)
        return by_powers(torch.from_numpy(sums), torch.from_numpy(counts))


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A model's answers to rows of a task: of each row the labels, the right ones, and nats. int64, int64, float64."""

    asked_N: np.ndarray
    right_N: np.ndarray
    nats_N: np.ndarray


def starts_of(split: Split) -> np.ndarray:
    """The number of each document's first label among all labels of a split, int64."""
    return np.asarray(split.offsets[:-1]) + np.arange(split.n_documents)


# ---- what needs the weights -----------------------------------------------------------------------------------------


@torch.no_grad()
def text_losses(
    model: LanguageModel,
    split: Split,
    *,
    eos_id: int,
    block_size: int,
    progress: Callable[[float], None] = lambda share: None,
) -> Losses:
    """Every loss on a split, in rows of `block_size` tokens without context from the previous row, as it is scored.

    progress: called with the share that is done. Computes under the caller's autocast.
    """
    require(split.n_documents > 0, "split", split.n_documents, "must have a document")
    batch_size = max(1, LOGIT_BYTES // (4 * block_size * model.config.vocab_size))
    rows = HeldOutRows(split, block_size, eos_id)
    nats, positions, done = [], [], 0
    for batch in rows.batches(batch_size):
        seq = Layout.from_documents(batch.document_BT).to(model.device)
        losses_BT = model.token_losses(batch.tokens_BT.to(model.device), batch.labels_BT.to(model.device), seq)
        there_BT = batch.labels_BT != NO_LABEL
        nats.append(losses_BT.double().cpu()[there_BT].numpy())
        positions.append(seq.position_BT.cpu()[there_BT].numpy())
        done += batch.n_labels
        progress(done / rows.n_labels)
    return Losses(nats_N=np.concatenate(nats), position_N=np.concatenate(positions))


@torch.no_grad()
def answers(model: LanguageModel, batches: Iterable[Batch]) -> Answers:
    """The answers at the labelled positions, row by row; a row is a document. Under the caller's autocast."""
    asked, right, nats = [], [], []
    for batch in batches:
        seq = Layout.from_documents(batch.document_BT).to(model.device)
        x_BTD, _ = model.hidden(batch.tokens_BT.to(model.device), seq)
        asked_BT = batch.labels_BT != NO_LABEL
        logits_QV = model.logits(x_BTD[asked_BT.to(model.device)])
        label_Q = batch.labels_BT[asked_BT].to(model.device)
        logits_QV = logits_QV.to(torch.promote_types(logits_QV.dtype, torch.float32))
        losses_Q = F.cross_entropy(logits_QV, label_Q, reduction="none").double().cpu()
        is_right_Q = (logits_QV.argmax(-1) == label_Q).cpu().double()
        row_Q, count = asked_BT.nonzero()[:, 0], len(asked_BT)
        asked.append(asked_BT.sum(1).numpy())
        right.append(torch.bincount(row_Q, is_right_Q, minlength=count).round().long().numpy())
        nats.append(torch.bincount(row_Q, losses_Q, minlength=count).numpy())
    return Answers(asked_N=np.concatenate(asked), right_N=np.concatenate(right), nats_N=np.concatenate(nats))


# ---- statistics -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Two runs' figures on the same documents or rows, each a sum of `amounts` over a sum of `weights`.

    difference: the second's less the first's, with its interval; infinite for one document.  count: of documents.
    effective: of how many documents of equal weight as much is known, (Σ weight)² / Σ weight².
    lower, higher: documents in which the second's figure is lower, or higher.
    """

    first: float
    second: float
    difference: Interval
    count: int
    effective: float
    lower: int
    higher: int

    @property
    def shown(self) -> bool:
        """Whether the interval leaves out 0."""
        _, low, high = self.difference
        return bool(low > 0 or high < 0)


def paired(first_N: np.ndarray, second_N: np.ndarray, weight_N: np.ndarray, *, seed: int = 0) -> Paired:
    """Compare two runs whose amounts on N documents of these weights are `first_N` and `second_N`.

    Raises `DataError` without weight.
    """
    weight_N = np.asarray(weight_N, dtype=float)
    total = float(weight_N.sum())
    if not total > 0:
        raise DataError("nothing to compare: these documents have no bytes")
    apart_N = np.asarray(second_N, dtype=float) - np.asarray(first_N, dtype=float)
    return Paired(
        first=float(np.sum(first_N)) / total,
        second=float(np.sum(second_N)) / total,
        difference=ratio_interval(apart_N, weight_N, seed=seed),
        count=len(weight_N),
        effective=total**2 / float((weight_N**2).sum()),
        lower=int((apart_N < 0).sum()),
        higher=int((apart_N > 0).sum()),
    )


def ratio_interval(
    amount_N: np.ndarray, weight_N: np.ndarray, *, level: float = LEVEL, seed: int = 0, resamples: int | None = None
) -> Interval:
    """Σ amount / Σ weight with its bootstrap interval over documents, which are drawn with their weights.

    Percentiles of `scipy.stats.bootstrap`, at the level that widens them for few documents as Student's t does
    (Hesterberg 2015, arXiv:1411.5279, section 5.3). BCa covers less in this estimator: its jackknife is led astray by
    the few longest documents (tests/study/coverage.py). Infinite for one document.
    """
    stats, count = scipy_stats(), len(amount_N)
    mean = float(np.sum(amount_N)) / float(np.sum(weight_N))
    if count < 2:
        return Interval(mean, -math.inf, math.inf)
    if np.array_equal(amount_N, mean * np.asarray(weight_N)):
        return Interval(mean, mean, mean)
    wider = 1 - 2 * stats.norm.sf(math.sqrt(count / (count - 1)) * stats.t.isf((1 - level) / 2, count - 1))
    found = stats.bootstrap(
        (np.asarray(amount_N, dtype=float), np.asarray(weight_N, dtype=float)),
        _ratio,
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=wider,
        n_resamples=resamples or min(RESAMPLES, max(FEWEST, DRAWS // count)),
        batch=max(1, AT_ONCE // count),
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


def _ratio(amount: Any, weight: Any, axis: int = -1) -> Any:
    return amount.sum(axis) / weight.sum(axis)


# ---- where they differ most -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TokenDifference:
    """A prediction of both runs, in nats, in its context. document, position: numbered from 0."""

    document: int
    position: int
    before: str
    token: str
    after: str
    first: float
    second: float

    @property
    def difference(self) -> float:
        """The second's loss less the first's."""
        return self.second - self.first


@dataclass(frozen=True, kw_only=True)
class KindDifference:
    """All predictions of one token of the vocabulary. first, second: mean nats."""

    token: str
    count: int
    first: float
    second: float

    @property
    def total(self) -> float:
        """Nats that the second needs more than the first for all of them."""
        return self.count * (self.second - self.first)


@dataclass(frozen=True, kw_only=True)
class DocumentDifference:
    """A document with its bits per byte, or a row of a task with its nats an answer. text: its beginning."""

    document: int
    weight: int
    first: float
    second: float
    text: str

    @property
    def difference(self) -> float:
        """The second's figure less the first's."""
        return self.second - self.first


Extremes = tuple[tuple[Any, ...], tuple[Any, ...]]  # where the second is better by most, and worse


def token_differences(
    first_N: np.ndarray, second_N: np.ndarray, split: Split, decode: Callable[[Sequence[int]], str], count: int = 10
) -> tuple[tuple[TokenDifference, ...], tuple[TokenDifference, ...]]:
    """The predictions in which the second run is better by most, and worse, at most `count` each, the largest first.

    Of all predictions of a token of the vocabulary only the one that differs most. first_N, second_N: nats of all
    labels of the split, as in `Losses`.
    """
    apart_N, labels_N, starts = second_N - first_N, labels_of(split), starts_of(split)

    def at(label: int) -> TokenDifference:
        document = int(np.searchsorted(starts, label, side="right")) - 1
        ids, place = split.document(document), label - int(starts[document])
        before = decode(ids[max(0, place - BEFORE) : place].tolist())[-SHOWN_BEFORE:]
        token = decode(ids[place : place + 1].tolist()) if place < len(ids) else END
        after = decode(ids[place + 1 : place + 1 + AFTER].tolist())[:SHOWN_AFTER]
        first, second = float(first_N[label]), float(second_N[label])
        return TokenDifference(
            document=document, position=place, before=before, token=token, after=after, first=first, second=second
        )

    return tuple(map(at, _largest(-apart_N, labels_N, count))), tuple(map(at, _largest(apart_N, labels_N, count)))


def labels_of(split: Split) -> np.ndarray:
    """All labels of a split in order, int64: the ids of each document, then `vocab_size` for its end."""
    tokens, ends = np.asarray(split.tokens, dtype=np.int64), np.asarray(split.offsets[1:])
    return np.insert(tokens, ends, split.vocab_size)


def _largest(values_N: np.ndarray, labels_N: np.ndarray, count: int) -> list[int]:
    """Places of the largest positive values, one a label, at most `count`, the largest first."""
    best_V = np.full(int(labels_N.max()) + 1, -np.inf)
    np.maximum.at(best_V, labels_N, values_N)
    chosen = [label for label in np.argsort(-best_V, kind="stable")[:count].tolist() if best_V[label] > 0]
    return [int(np.flatnonzero((labels_N == label) & (values_N == best_V[label]))[0]) for label in chosen]


def kind_differences(
    first_N: np.ndarray, second_N: np.ndarray, split: Split, decode: Callable[[Sequence[int]], str], count: int = 10
) -> tuple[tuple[KindDifference, ...], tuple[KindDifference, ...]]:
    """The tokens of the vocabulary in whose predictions the second run gains most in all, and loses most."""
    labels_N = labels_of(split)
    counts_V, firsts_V, seconds_V = (np.bincount(labels_N, each) for each in (None, first_N, second_N))
    order = [token for token in np.argsort(seconds_V - firsts_V, kind="stable").tolist() if counts_V[token]]

    def of(token: int) -> KindDifference:
        name, n = END if token == split.vocab_size else decode([token]), int(counts_V[token])
        return KindDifference(token=name, count=n, first=float(firsts_V[token]) / n, second=float(seconds_V[token]) / n)

    better, worse = map(of, order[:count]), map(of, order[::-1][:count])
    return tuple(kind for kind in better if kind.total < 0), tuple(kind for kind in worse if kind.total > 0)


def document_differences(
    first_N: np.ndarray, second_N: np.ndarray, weight_N: np.ndarray, text: Callable[[int], str], count: int = 6
) -> tuple[tuple[DocumentDifference, ...], tuple[DocumentDifference, ...]]:
    """The documents that move the figure most, each way, at most `count` each: Σ amount apart, not over weight.

    first_N, second_N: amounts.  text: of a document, by its number.
    """
    apart_N = np.asarray(second_N, dtype=float) - np.asarray(first_N, dtype=float)
    order = np.argsort(apart_N, kind="stable")

    def of(number: int) -> DocumentDifference:
        weight = int(weight_N[number])
        first, second = float(first_N[number]) / max(1, weight), float(second_N[number]) / max(1, weight)
        return DocumentDifference(
            document=number, weight=weight, first=first, second=second, text=text(number)[:BEGINNING]
        )

    better = tuple(of(int(number)) for number in order[:count] if apart_N[number] < 0)
    return better, tuple(of(int(number)) for number in order[::-1][:count] if apart_N[number] > 0)


def shares(
    first_N: np.ndarray, second_N: np.ndarray, weight_N: np.ndarray, points: int = 120
) -> list[tuple[float, float]]:
    """(share of all weight, difference of the figure) of documents in the order of their difference, at most `points`.

    Documents that hold the first and the last hundredth of the weight, which may be tiny and far off, are left out.
    """
    weight_N = np.asarray(weight_N, dtype=float)
    some = weight_N > 0
    weight = weight_N[some]
    apart = (np.asarray(second_N, dtype=float) - np.asarray(first_N, dtype=float))[some] / weight
    order = np.argsort(apart, kind="stable")
    middle = (np.cumsum(weight[order]) - weight[order] / 2) / weight.sum()
    kept = np.flatnonzero((middle >= 0.01) & (middle <= 0.99))
    kept = kept if len(kept) else np.arange(len(order))
    chosen = kept[np.unique(np.linspace(0, len(kept) - 1, min(points, len(kept))).round().astype(int))]
    return [(float(middle[at]), float(apart[order][at])) for at in chosen]


# ---- the same documents for both runs -------------------------------------------------------------------------------


def encoded(texts: Iterable[str], tokenizer: Tokenizer, like: Split) -> Split:
    """The documents of `like`, whose texts are given, with another tokenizer, in memory; byte counts stay.

    Raises `DataError` for texts that the tokenizer cannot write, or that it loses a part of.
    """
    documents: list[np.ndarray] = []
    for number, text in enumerate(texts):
        ids = [each for piece in pieces(text, tokenizer) for each in tokenizer.encode(piece)]
        written = len(tokenizer.decode(ids).encode())
        if written != like.byte_counts[number] or not ids:
            raise DataError(
                f"document {number}: has {like.byte_counts[number]} bytes, and {written} when this tokenizer has "
                "encoded it: bits per byte cannot be compared"
            )
        documents.append(np.array(ids, dtype=token_dtype(tokenizer.vocab_size)))
    ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
    return replace(
        like,
        tokens=np.concatenate(documents),
        offsets=np.concatenate([np.zeros(1, dtype=np.int64), ends]),
        vocab_size=tokenizer.vocab_size,
    )


def texts_of(split: Split, tokenizer: Tokenizer) -> Iterator[str]:
    """The documents' texts."""
    return (tokenizer.decode(split.document(index).tolist()) for index in range(split.n_documents))
