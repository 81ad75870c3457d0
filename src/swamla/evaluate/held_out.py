"""Held-out loss, perplexity and bits per byte."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from swamla import distributed
from swamla.data.chat_rows import ChatDataset
from swamla.data.dataset import Dataset, TrainingData
from swamla.data.packing import NO_LABEL, Batch, HeldOutRows
from swamla.data.shards import Split, place_of
from swamla.data.task_rows import TaskDataset
from swamla.errors import DataError, require
from swamla.model.language_model import LanguageModel
from swamla.ops.layout import PADDING, Layout

EVALUATION_TOKENS = 16384  # per forward pass: more would only cost memory
PARTS = ("all", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of an evaluation. loss: nats per label.  tokens: labels, including each document's end.

    bytes: UTF-8 bytes of the labels' text, exact for a whole split, else proportional to the number of labels.
    """

    loss: float
    tokens: int
    bytes: float

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite on overflow."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, comparable across tokenizers and with gzip and xz."""
        return self.loss * self.tokens / math.log(2) / self.bytes

    def as_dict(self) -> dict[str, float]:
        """All five figures by name."""
        return asdict(self) | {"perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The result of an evaluation on a task. loss: nats per label.  tokens: labels.

    accuracy: the share of labels that are the model's likeliest token, 0 … 1.
    """

    loss: float
    accuracy: float
    tokens: int

    def as_dict(self) -> dict[str, float]:
        """All three figures by name."""
        return asdict(self)


@torch.no_grad()
def evaluate_answers(model: LanguageModel, batches: Iterable[Batch]) -> Answers:
    """Score the answers at the labelled positions, as `evaluate` does with texts; computes all logits of these.

    Raises `DataError` without labels.
    """
    was_training, nats, right, labels = model.training, 0.0, 0, 0
    model.eval()
    try:
        for batch in _share(batches):
            seq = Layout.from_documents(batch.document_BT).to(model.device)
            x_BTD, _ = model.hidden(batch.tokens_BT.to(model.device), seq)
            asked_BT = batch.labels_BT != NO_LABEL
            logits_QV = model.logits(x_BTD[asked_BT.to(model.device)])
            label_Q = batch.labels_BT[asked_BT].to(model.device)
            dtype = torch.promote_types(logits_QV.dtype, torch.float32)
            nats += F.cross_entropy(logits_QV.to(dtype), label_Q, reduction="sum").item()
            right += int((logits_QV.argmax(-1) == label_Q).sum())
            labels += len(label_Q)
    finally:
        model.train(was_training)
    nats, right, labels = distributed.sum_of(nats), round(distributed.sum_of(right)), round(distributed.sum_of(labels))
    if labels == 0:
        raise DataError("nothing to evaluate: no position of these rows has a label")
    return Answers(loss=nats / labels, accuracy=right / labels, tokens=labels)


@torch.no_grad()
def evaluate(model: LanguageModel, batches: Iterable[Batch], *, bytes_per_label: float) -> Evaluation:
    """Score `batches` with the model in evaluation mode; its mode is restored afterwards.

    Every rank must pass the same batches. Each scores its share, and all return the result of all batches.
    bytes_per_label: bytes of the whole text divided by its labels.
    Computes under the caller's autocast and sums in fp64. Raises `DataError` without labels.
    """
    was_training, nats, labels = model.training, 0.0, 0
    model.eval()
    try:
        for batch in _share(batches):
            seq = Layout.from_documents(batch.document_BT).to(model.device)
            total, _ = model.loss(batch.tokens_BT.to(model.device), batch.labels_BT.to(model.device), seq)
            nats += total.item()
            labels += batch.n_labels
    finally:
        model.train(was_training)
    nats, labels = distributed.sum_of(nats), round(distributed.sum_of(labels))
    if labels == 0:
        raise DataError("nothing to evaluate: the held-out split has no documents")
    return Evaluation(loss=nats / labels, tokens=labels, bytes=labels * bytes_per_label)


def _share(batches: Iterable[Batch]) -> Iterator[Batch]:
    """This rank's batch of each group of `world_size`, so that all ranks make the same number of forward passes.

    In an incomplete last group, ranks without a batch get one of padding.
    """
    rank, ranks = distributed.rank(), distributed.world_size()
    batches = iter(batches)
    while together := list(islice(batches, ranks)):
        first = together[0]
        padding = replace(
            first,
            labels_BT=torch.full_like(first.labels_BT, NO_LABEL),
            document_BT=torch.full_like(first.document_BT, PADDING),
        )
        yield together[rank] if rank < len(together) else padding


def bytes_apart(split: Split, decode: Callable[[Sequence[int]], str]) -> int:
    """A split's counted UTF-8 bytes minus those of its decoded tokens.

    Must be 0. Otherwise the tokenizer loses text or bytes were miscounted, and bits per byte are wrong.
    """
    return split.n_bytes - sum(len(decode(split.document(i).tolist()).encode()) for i in range(split.n_documents))


def evaluate_split(
    model: LanguageModel, split: Split, *, eos_id: int, block_size: int, batch_size: int, max_tokens: int | None = None
) -> Evaluation:
    """Score a split in order, in rows of `block_size` tokens without context from the previous row.

    max_tokens: score at most that many tokens, in rows that are evenly spaced over the split (at least one row); None
    scores every token exactly once. Raises `DataError` for a split without documents.
    """
    if split.n_documents == 0:
        raise DataError("nothing to evaluate: the held-out split has no documents")
    labels = split.n_tokens + split.n_documents
    most_rows = None if max_tokens is None else max(1, max_tokens // block_size)
    batches = HeldOutRows(split, block_size, eos_id).batches(batch_size, most_rows)
    found = evaluate(model, batches, bytes_per_label=split.n_bytes / labels)
    exact = split.n_bytes if found.tokens == labels else found.bytes
    return Evaluation(loss=found.loss, tokens=found.tokens, bytes=exact)


def part_of(split: Split, part: str, decode: Callable[[Sequence[int]], str]) -> Split:
    """All of a held-out split, or its validation or test part: about half of the bytes each, in memory.

    Choices are made by the validation part, so that the test part, which is read once, knows nothing of them. Documents
    are divided in the order of the hash of their text; an only document is cut in two, between characters. Raises
    `ConfigError` for another part, `DataError` for text that cannot be divided.
    """
    require(part in PARTS, "part", part, f"must be one of {', '.join(PARTS)}")
    if part == "all":
        return split
    if split.n_documents < 2:
        first, last = _cut(split, decode)
        return first if part == "validation" else last
    order = sorted(range(split.n_documents), key=lambda i: (place_of(decode(split.document(i).tolist())), i))
    seen = np.cumsum(split.byte_counts[order])
    count = 1 + int(np.abs(seen[:-1] - seen[-1] / 2).argmin())
    chosen = sorted(order[:count] if part == "validation" else order[count:])
    return _in_memory(split, [split.document(i) for i in chosen], split.byte_counts[chosen])


def _cut(split: Split, decode: Callable[[Sequence[int]], str]) -> tuple[Split, Split]:
    """The halves of an only document, cut at the first place from the middle that is no part of a character."""
    ids = split.document(0) if split.n_documents else np.empty(0, dtype=np.uint16)
    for at in range(len(ids) // 2, len(ids)):
        halves = ids[:at], ids[at:]
        sizes = [len(decode(half.tolist()).encode()) for half in halves]
        if at and sum(sizes) == split.n_bytes:
            first, last = (_in_memory(split, [half], size) for half, size in zip(halves, sizes, strict=True))
            return first, last
    raise DataError("the held-out text has too little to divide into a validation and a test part: hold out more text")


def _in_memory(split: Split, documents: Sequence[np.ndarray], byte_counts: Any) -> Split:
    ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
    return replace(
        split,
        tokens=np.concatenate(documents),
        offsets=np.concatenate([np.zeros(1, dtype=np.int64), ends]),
        byte_counts=np.atleast_1d(np.asarray(byte_counts, dtype=np.int64)),
    )


def validation(
    dataset: TrainingData, block_size: int, max_tokens: int | None = None, part: str = "all"
) -> Callable[[LanguageModel], dict[str, float]]:
    """A function that scores a model on the held-out split, or on `max_tokens` of it in evenly spaced rows.

    part: all of the split, or its validation or test part (`part_of`). The function is what `swamla.train.train` takes
    as `evaluate`; its figures are those of `Evaluation.as_dict`. Of a task, whose held-out rows are endless, it scores
    the first 1024 rows, or `max_tokens` tokens, and the figures are those of `Answers.as_dict`; the test part has rows
    of its own, the others are the same. Of conversations it scores the held-out answers, with these figures.
    """
    batch_size = max(1, EVALUATION_TOKENS // block_size)
    if isinstance(dataset, TaskDataset):
        require(part in PARTS, "part", part, f"must be one of {', '.join(PARTS)}")
        rows = list(dataset.held_out_rows(batch_size, max_tokens, test=part == "test"))  # the same every time
        return lambda model: evaluate_answers(model, rows).as_dict()
    if isinstance(dataset, ChatDataset):
        require(part in PARTS, "part", part, f"must be one of {', '.join(PARTS)}")
        chats = list(dataset.held_out_rows(batch_size, block_size, max_tokens, part=part))
        return lambda model: evaluate_answers(model, chats).as_dict()
    assert isinstance(dataset, Dataset)
    split = part_of(dataset.held_out, part, dataset.tokenizer.decode)

    def evaluate(model: LanguageModel) -> dict[str, float]:
        return evaluate_split(
            model,
            split,
            eos_id=dataset.tokenizer.eos_id,
            block_size=block_size,
            batch_size=batch_size,
            max_tokens=max_tokens,
        ).as_dict()

    return evaluate
