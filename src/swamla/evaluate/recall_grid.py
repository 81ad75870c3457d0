"""Recall: how often a model answers a task's queries, beside the bytes of state that it answers from."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

import torch
from torch import Tensor

from swamla.errors import ConfigError, UsageError, require
from swamla.evaluate.held_out import EVALUATION_TOKENS
from swamla.model.accounting import state_bytes
from swamla.model.language_model import NO_LABEL, LanguageModel
from swamla.ops.layout import Layout
from swamla.shares import independent_trials, wilson
from swamla.tasks import PREFIX, Task, examples, parse

LOGITS_AT_ONCE = 1024  # queries whose logits are held at the same time
KNOWN = 0.99  # of the answers: a task is learned
ROWS = 512  # scored, unless told how many
SEED = 1  # not 0, as in evaluations of training: by those rows a run's best checkpoint is chosen


@dataclass(frozen=True, kw_only=True)
class Score:
    """How often a model was right. right, queries: numbers of labels.  rows: that they stand in.

    trials: how many independent queries these are worth, see `independent_trials`.
    """

    right: int
    queries: int
    rows: int
    trials: float

    @property
    def accuracy(self) -> float:
        """The share of queries whose label has the largest logit."""
        return self.right / self.queries

    @property
    def interval(self) -> tuple[float, float]:
        """The accuracy's Wilson interval at 95 %, of `trials` independent queries."""
        return wilson(self.accuracy * self.trials, self.trials)

    @classmethod
    def of(cls, right_BT: Tensor, labels_BT: Tensor) -> "Score":
        """Of the labels other than -100 those that are True in `right_BT`."""
        right_B, queries_B = right_BT.sum(dim=1), (labels_BT != NO_LABEL).sum(dim=1)
        return cls(
            right=int(right_B.sum()),
            queries=int(queries_B.sum()),
            rows=len(right_B),
            trials=independent_trials(right_B.tolist(), queries_B.tolist()),
        )


@dataclass(frozen=True, kw_only=True)
class Recall:
    """A model's answers to a task. state_bytes: of one row's state at the task's length, in fp32."""

    task: Task
    score: Score
    state_bytes: int


def recall(
    model: LanguageModel,
    task: Task,
    *,
    rows: int = ROWS,
    seed: int = SEED,
    progress: Callable[[float], None] = lambda share: None,
) -> Recall:
    """Score a model, in evaluation mode, on `rows` held-out rows of a task; its mode is restored afterwards.

    Computes under the caller's autocast. Equal rows count once, so a task of few different rows is scored on fewer.
    progress: called with the share of rows that are done. Raises as `require_fits` does, and `ConfigError` without
    rows.
    """
    require(rows > 0, "rows", rows, "must be > 0, e.g. 512")
    require_fits(model, task)
    at_once = max(1, EVALUATION_TOKENS // task.length)
    was_training, right, labels, seen = model.training, [], [], set[bytes]()
    model.eval()
    try:
        for first in range(0, rows, at_once):
            progress(first / rows)
            batch = examples(task, seed, range(first, min(rows, first + at_once)), held_out=True)
            new = []
            for index, row_T in enumerate(batch.tokens_BT.numpy()):
                if (key := row_T.tobytes()) not in seen:
                    seen.add(key)
                    new.append(index)
            if new:
                tokens_BT, labels_BT = batch.tokens_BT[new], batch.labels_BT[new]
                right.append(right_answers(model, tokens_BT.to(model.device), labels_BT.to(model.device)).cpu())
                labels.append(labels_BT)
    finally:
        model.train(was_training)
    progress(1.0)
    return Recall(
        task=task,
        score=Score.of(torch.cat(right), torch.cat(labels)),
        state_bytes=state_bytes(model.config, task.length),
    )


def grid(task: Task, sizes: Mapping[str, Sequence[Any]]) -> Iterator[Task | ConfigError]:
    """`task` with each combination of these values of its sizes, or the task's own reason why there is none.

    The last size changes fastest. Values may be text, as in `swamla.tasks.parse`.
    """
    own = {size.name: getattr(task, size.name) for size in fields(task)}
    for values in product(*sizes.values()):
        chosen = own | dict(zip(sizes, values, strict=True))
        try:
            yield parse(f"{task.kind}?{'&'.join(f'{name}={value}' for name, value in chosen.items())}")
        except ConfigError as error:
            yield error


def require_fits(model: LanguageModel, task: Task) -> None:
    """Raise `UsageError` if a task has more ids than a model, or rows longer than its learned positions."""
    ids, positions = model.known_ids or model.config.vocab_size, model.config.learned_positions
    if task.vocab_size > ids:
        raise UsageError(f"{PREFIX}{task}: has {task.vocab_size} ids, and the model knows {ids}: at most these fit")
    if positions and task.length > positions:
        raise UsageError(
            f"{PREFIX}{task}: has rows of {task.length} tokens, and the model {positions} learned positions: at most "
            "so many tokens fit"
        )


@torch.no_grad()
def right_answers(model: LanguageModel, tokens_BT: Tensor, labels_BT: Tensor, seq: Layout | None = None) -> Tensor:
    """Where the label (B, T) of a query has the largest logit after its token; False where the label is -100.

    Only ids that the model may generate compete, see `known_ids`. By one forward pass; logits are computed at the
    queries alone. seq: the documents, by default one a row.
    """
    asked_BT = labels_BT != NO_LABEL
    x_QD = model.hidden(tokens_BT, seq)[0][asked_BT]
    found = [model.logits(part_QD)[:, : model.known_ids].argmax(dim=-1) for part_QD in x_QD.split(LOGITS_AT_ONCE)]
    right_BT = torch.zeros_like(asked_BT)
    right_BT[asked_BT] = torch.cat(found) == labels_BT[asked_BT]
    return right_BT


def steps_to(
    records: Iterable[Mapping[str, Any]], level: float = KNOWN, *, key: str = "held_out_accuracy"
) -> int | None:
    """The step of the first record of a run's metrics whose `key` is at least `level`; None without such a record."""
    evaluations = (record for record in records if record.get(key) is not None)
    return next((record["step"] for record in evaluations if record[key] >= level), None)
