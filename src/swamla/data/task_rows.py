"""The rows of a task as the data of a run: endless, the held-out ones apart, resumed at the very next row."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from swamla.data.dataset import TrainingData
from swamla.data.packing import Batch
from swamla.data.tokenizer import NameTokenizer
from swamla.errors import require
from swamla.tasks import HELD_OUT, PREFIX, RULES, Examples, Task, examples

HELD_OUT_ROWS = 1024  # scored by an evaluation that is not told how many tokens
_HELD_OUT_SEED, _TEST_SEED = 0, 1  # of every run, so that all are scored on the same rows


class TaskDataset(TrainingData):
    """The rows of a task: of the run's seed for training, of one seed for all runs to score them."""

    def __init__(self, task: Task) -> None:
        self.task, self.tokenizer = task, NameTokenizer(task.names())
        content = ["task", RULES, str(task), self.tokenizer.fingerprint]
        self.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def source(self) -> str:
        return f"{PREFIX}{self.task}"

    def rows(self, block_size: int, seed: int) -> "TaskRows":
        """The training rows. Raises `ConfigError` for another length than the task's."""
        fits = f"must be {self.task.length}, the length of the task's rows"
        require(block_size == self.task.length, "train.block_size", block_size, fits)
        return TaskRows(self.task, seed)

    def held_out_rows(self, batch_size: int, max_tokens: int | None = None, *, test: bool = False) -> Iterator[Batch]:
        """Batches of held-out rows, the last one smaller; as many as have `max_tokens` tokens (at least one row).

        test: others, drawn independently, for a score that no choice was made by.
        """
        count = HELD_OUT_ROWS if max_tokens is None else max(1, max_tokens // self.task.length)
        for first in range(0, count, batch_size):
            indices = range(first, min(first + batch_size, count))
            yield _batch(examples(self.task, _TEST_SEED if test else _HELD_OUT_SEED, indices, held_out=True))

    @property
    def bytes_per_label(self) -> None:
        return None

    def epochs(self) -> dict[str, int]:
        return {}  # rows do not end

    def identity(self) -> list[dict[str, str]]:
        return [{"fingerprint": self.fingerprint, "raw": ""}]

    def describe(self) -> list[tuple[str, str]]:
        names, task = self.task.names(), self.task
        asked = len(task.row(0, 0).query_Q)
        return [
            ("source", self.source),
            ("tokenizer", f"none: {task.vocab_size} ids with names, {names[0]} … {names[-1]}"),
            ("train", f"endless rows of {task.length} tokens, {asked} labels in the first one"),
            ("held out", f"{HELD_OUT:.0%} of all possible rows, chosen by a hash of each row"),
            ("fingerprint", self.fingerprint[:16]),
        ]


@dataclass(frozen=True)
class TaskRows:
    """The training rows of a task: sample i is its row i of this seed."""

    task: Task
    seed: int

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples first_sample … first_sample + count - 1."""
        return _batch(examples(self.task, self.seed, range(first_sample, first_sample + count)))


def _batch(rows: Examples) -> Batch:
    """Every row is one document."""
    return Batch(rows.tokens_BT, rows.labels_BT, torch.zeros_like(rows.tokens_BT))
