"""Conversations as the data of a run: best-fit rows of whole ones, whose answers alone carry loss."""

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from swamla.data.chat import Conversation, Message, make_template, read_conversations
from swamla.data.config import CHAT, DataConfig
from swamla.data.dataset import TrainingData
from swamla.data.packing import NO_LABEL, Batch, BestFitRows
from swamla.data.reading import Notes
from swamla.data.shards import PLACES, Split, place_of, rule_for_many, usable_fraction_of
from swamla.data.tokenizer import Tokenizer, make_tokenizer
from swamla.errors import DataError, require

UNLEARNED = 1 << 31  # added to an id that carries no loss, while documents are packed
BUFFER_DOCS = 1000  # packed together, unless the config says how many
_HELD_OUT_SEED = 0


@dataclass(frozen=True)
class _Row:
    """A conversation of the file. number: of its row, from 1.  place: which decides whether it is held out."""

    number: int
    place: int
    messages: list[Message]
    tokens: Conversation


class ChatDataset(TrainingData):
    """The conversations of a file, those for training and the held-out ones."""

    def __init__(self, config: DataConfig, tokenizer: str = "") -> None:
        """Read and encode all conversations. tokenizer: of a run to be resumed, in place of the config's.

        Raises `DataError` naming the file, and the row if one cannot be used.
        """
        assert config.chat is not None
        self.config, self.path, self.notes = config, Path(config.chat).expanduser(), Notes()
        self._base = make_tokenizer(tokenizer or config.tokenizer)
        self.template = make_template(config.template, self._base)
        self.tokenizer = self.template.tokenizer
        rows = list(self._read())
        fraction = usable_fraction_of({row.place for row in rows}, config.held_out_fraction)
        if len({row.place for row in rows}) < 2 and fraction < 1:
            raise DataError(f"{self.path}: needs at least two different conversations, one of them to be held out")
        self.rule = rule_for_many(fraction)
        self.held_out = [row for row in rows if row.place < fraction * PLACES]
        self.train = [row for row in rows if row.place >= fraction * PLACES]
        digest = hashlib.sha256(json.dumps([config.template, self.tokenizer.fingerprint]).encode())
        for part in (self.train, self.held_out):
            for row in part:
                digest.update(_marked(row.tokens).tobytes() + b"\xff" * 8)
            digest.update(b"\xfe" * 8)
        self.fingerprint = digest.hexdigest()

    def _read(self) -> Iterator[_Row]:
        for number, messages in read_conversations(self.path, self.config.on_bad_row, self.notes):
            try:
                tokens = self.template.conversation(messages)
            except DataError as error:
                raise DataError(f"{self.path}: row {number}: {error}") from error
            yield _Row(number, place_of(json.dumps(messages, sort_keys=True)), messages, tokens)

    @property
    def base(self) -> Tokenizer:
        """The tokenizer without the special ids that the template adds."""
        return self._base

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Those of the template, apart from the one that begins documents."""
        return self.template.special_ids

    @property
    def source(self) -> str:
        return f"{CHAT}{self.path}"

    def rows(self, block_size: int, seed: int) -> "ChatRows":
        """The endless training rows. Raises `DataError` for a conversation that is too long, unless it is cut."""
        return self._packed(self.train, block_size, seed)

    def held_out_rows(
        self, batch_size: int, block_size: int, max_tokens: int | None = None, *, part: str = "all"
    ) -> Iterator[Batch]:
        """Batches of rows with every held-out conversation once, the last one smaller.

        max_tokens: only the first rows that have as many tokens (at least one row).  part: the half "validation" or
        "test" of the conversations.
        """
        ordered = sorted(self.held_out, key=lambda row: row.place)
        half = len(ordered) // 2
        chosen = {"all": ordered, "validation": ordered[:half], "test": ordered[half:]}[part]
        require(bool(chosen), "part", part, "needs at least two held-out conversations")
        rows = self._packed(chosen, block_size, _HELD_OUT_SEED)
        count = rows.n_rows if max_tokens is None else min(rows.n_rows, max(1, max_tokens // block_size))
        for first in range(0, count, batch_size):
            yield rows.batch(first, min(batch_size, count - first))

    def question(self, positions: int = 0) -> tuple[list[Message], str] | None:
        """The messages of a held-out conversation before an answer, and that answer; None where no message is before.

        positions: tokens that the question may have as a prompt; 0 for any number.
        """
        for messages in (row.messages for row in self.held_out):
            for at, message in enumerate(messages):
                asked = messages[:at]
                if asked and message["role"] == "assistant":
                    if not positions or len(self.template.prompt(asked)) <= positions:
                        return asked, message["content"]
                    break  # what follows is longer
        return None

    def _packed(self, rows: Sequence[_Row], block_size: int, seed: int) -> "ChatRows":
        require(block_size > 0, "block_size", block_size, "must be > 0, e.g. 512")
        fitting = [ids for row in rows if (ids := self._fitted(row, block_size)) is not None]
        long = sum(len(row.tokens.ids) >= block_size for row in rows)
        if long:
            done = "cut at the row's end" if self.config.on_long_row == "cut" else "left out"
            warnings.warn(
                f"{self.path}: {long} of {len(rows)} conversations are longer than block_size = {block_size}: {done}",
                stacklevel=3,
            )
        if not fitting:
            raise DataError(f"{self.path}: no conversation fits rows of block_size = {block_size}")
        offsets = np.cumsum([0, *map(len, fitting)], dtype=np.int64)
        sizes = np.zeros(len(fitting), dtype=np.int64)
        tokens = np.concatenate(fitting)
        split = Split(path=self.path, tokens=tokens, offsets=offsets, byte_counts=sizes, vocab_size=2 * UNLEARNED)
        buffer = self.config.buffer_docs or BUFFER_DOCS
        return ChatRows(BestFitRows(split, block_size, seed, self.tokenizer.eos_id + UNLEARNED, buffer))

    def _fitted(self, row: _Row, block_size: int) -> np.ndarray | None:
        """The marked ids of a conversation, which begins with the document's start; None if it is left out."""
        ids = _marked(row.tokens)
        if len(ids) < block_size:
            return ids
        if self.config.on_long_row == "stop":
            raise DataError(
                f"{self.path}: row {row.number}: {len(ids) + 1} tokens, more than block_size = {block_size}: must fit "
                'a row; or on_long_row = "cut", which drops what is beyond it, or "skip"'
            )
        ids = ids[: block_size - 1]
        return ids if self.config.on_long_row == "cut" and (ids < UNLEARNED).any() else None

    @property
    def bytes_per_label(self) -> None:
        return None

    def epochs(self) -> dict[str, int]:
        return {self.source: sum(sum(row.tokens.learned) for row in self.train)}

    def identity(self) -> list[dict[str, str]]:
        return [{"fingerprint": self.fingerprint, "raw": ""}]

    def describe(self) -> list[tuple[str, str]]:
        new = self.tokenizer.vocab_size - self.base.vocab_size
        more = f", {new} new special ids" if new else ""
        rows = [
            ("source", self.source),
            ("tokenizer", f"{self.config.tokenizer}, vocabulary {self.tokenizer.vocab_size}{more}"),
            ("train", _described(self.train)),
            ("held out", f"{_described(self.held_out)} ({self.rule})"),
        ]
        rows += [("note", line) for line in self.notes.lines()]
        return [*rows, ("fingerprint", self.fingerprint[:16])]


@dataclass(frozen=True)
class ChatRows:
    """Rows of whole conversations. packed: of ids to which `UNLEARNED` is added where they carry no loss."""

    packed: BestFitRows

    @property
    def n_rows(self) -> int:
        """Rows that have every conversation once."""
        return self.packed.rows_per_epoch

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples first_sample … first_sample + count - 1."""
        found = self.packed.batch(first_sample, count)
        carries_none = (found.labels_BT & UNLEARNED) != 0
        labels_BT = found.labels_BT.masked_fill(carries_none, NO_LABEL)
        return Batch(_plain(found.tokens_BT), labels_BT, found.document_BT)


def _plain(marked: Tensor) -> Tensor:
    return torch.bitwise_and(marked, UNLEARNED - 1)


def _marked(tokens: Conversation) -> np.ndarray:
    return np.array(tokens.ids, dtype=np.int64) + UNLEARNED * ~np.array(tokens.learned, dtype=bool)


def _described(rows: Sequence[_Row]) -> str:
    learned = sum(sum(row.tokens.learned) for row in rows)
    tokens = sum(len(row.tokens.ids) for row in rows)
    return f"{len(rows):,} conversation{'s' * (len(rows) != 1)}, {tokens:,} tokens, {learned:,} of them learned"
