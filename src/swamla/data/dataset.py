"""A prepared dataset: a folder of shards, their tokenizer, and meta.json with the size and SHA-256 of each file."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from swamla.data.notes import Notes
from swamla.data.shards import Split
from swamla.data.tokenizer import Tokenizer, load_tokenizer
from swamla.errors import CorruptError, DataError
from swamla.files import sha256_of

if TYPE_CHECKING:
    from swamla.data.packing import Batch

FORMAT_VERSION = 2
_READ = (1, 2)
META, TOKENIZER, HELD_OUT_TEXT = "meta.json", "tokenizer.json", "held_out.txt"


@dataclass(frozen=True)
class Throughput:
    """What was encoded just now, in how many seconds and by how many processes; reading and writing count."""

    tokens: int
    bytes: int
    seconds: float
    workers: int

    def __str__(self) -> str:
        seconds = max(self.seconds, 1e-9)
        return (
            f"{self.tokens:,} tokens in {self.seconds:.1f} s by {self.workers} process{'es' * (self.workers > 1)}: "
            f"{self.tokens / seconds:,.0f} tokens/s, {self.bytes / seconds / 1e6:.1f} MB/s"
        )


class Rows(Protocol):
    """Rows to train on: sample i is the same whoever asks, and in whatever order."""

    def batch(self, first_sample: int, count: int) -> "Batch":
        """Samples first_sample … first_sample + count - 1."""


class Dataset:
    """Text as tokens, split into documents to train on and held-out ones.

    throughput: of its making, where that was now; None for what the cache had.
    raw: what the files were that it was made from (`Source.digest`), where that is known.
    """

    _buffer_docs = 0
    raw = ""

    def __init__(
        self, path: Path, meta: dict[str, Any], tokenizer: Tokenizer, throughput: Throughput | None = None
    ) -> None:
        self.path = path
        self.meta = meta
        self.tokenizer = tokenizer
        self.throughput = throughput
        self.fingerprint: str = meta["fingerprint"]

    @classmethod
    def open(cls, path: str | Path, throughput: Throughput | None = None) -> "Dataset":
        """Open a folder that `prepare` made, checking sizes and that tokenizer and shards agree, not every byte.

        Raises DataError if there is none, CorruptError for a damaged one.
        """
        path = Path(path)
        meta = _read_meta(path)
        for name, entry in meta["files"].items():
            _require_size(path / name, entry["size"])
        tokenizer = load_tokenizer(path / TOKENIZER)
        if tokenizer.fingerprint != meta["tokenizer"]["fingerprint"]:
            raise CorruptError(
                f"{path / TOKENIZER}: not the tokenizer that these shards were made with (fingerprint "
                f"{tokenizer.fingerprint[:12]}, shards {meta['tokenizer']['fingerprint'][:12]}); delete {path}"
            )
        dataset = cls(path, meta, tokenizer, throughput)
        assert dataset.train.vocab_size == dataset.held_out.vocab_size  # opened now: what is damaged is told now
        counted, there = dataset.held_out.n_bytes, meta["files"][HELD_OUT_TEXT]["size"]
        if counted != there:
            raise CorruptError(
                f"{path}: held_out.bytes.npy counts {counted} bytes of text, {HELD_OUT_TEXT} has {there}; delete {path}"
            )
        return dataset

    @cached_property
    def train(self) -> Split:
        """The documents to train on."""
        return Split.open(self.path, "train", self.tokenizer.vocab_size)

    @cached_property
    def held_out(self) -> Split:
        """The documents never trained on."""
        return Split.open(self.path, "held_out", self.tokenizer.vocab_size)

    def rows(self, block_size: int, seed: int) -> "Rows":
        """The endless rows to train on."""
        from swamla.data.blocks import BestFitRows
        from swamla.data.sampler import PackedRows

        if not self.train.n_documents:
            raise DataError(f"{self.meta['source']}: there is nothing to train on: all of its text is held out")
        if self._buffer_docs:
            return BestFitRows(self.train, block_size, seed, self.tokenizer.eos_id, self._buffer_docs)
        return PackedRows(self.train, block_size, seed, self.tokenizer.eos_id)

    def fit_documents(self, buffer_docs: int) -> None:
        """From now on fit whole documents into rows, so many at a time: the same text, learned in another order."""
        self._buffer_docs = buffer_docs
        self.fingerprint = hashlib.sha256(f"{self.fingerprint} buffer_docs {buffer_docs}".encode()).hexdigest()

    @property
    def bytes_per_label(self) -> float:
        """UTF-8 bytes of text to train on for each position that carries loss."""
        return self.train.n_bytes / (self.train.n_tokens + self.train.n_documents)

    def epochs(self) -> dict[str, int]:
        """For each source how many positions that carry loss there are until all of its text was seen once."""
        return {self.meta["source"]: self.train.n_tokens + self.train.n_documents}

    def identity(self) -> list[dict[str, str]]:
        """What a run keeps to find its data again: the fingerprint of each prepared source, and what it was made of."""
        return [{"fingerprint": self.meta["fingerprint"], "raw": self.raw}]

    def verify(self) -> None:
        """Check every byte against its SHA-256 and every id against the vocabulary; CorruptError names the file."""
        for name, entry in self.meta["files"].items():
            if sha256_of(self.path / name) != entry["sha256"]:
                raise CorruptError(f"{self.path / name}: damaged (SHA-256 differs); delete {self.path}")
        self.train.verify()
        self.held_out.verify()

    def held_out_text(self) -> bytes:
        """All held-out documents, one behind the other, in UTF-8: what other compressors are to be given."""
        return (self.path / HELD_OUT_TEXT).read_bytes()

    @cached_property
    def bytes_per_token(self) -> float:
        """Held-out UTF-8 bytes for each held-out token, ends of documents not counted."""
        return self.held_out.n_bytes / self.held_out.n_tokens

    def describe(self) -> list[tuple[str, str]]:
        """(label, value) rows for people."""
        meta, notes = self.meta, Notes(self.meta["notes"])
        total = self.train.n_bytes + self.held_out.n_bytes
        share = f"{self.held_out.n_bytes / total:.2%} of the text; {meta['held_out_rule']}"
        rows = [
            ("source", meta["source"]),
            ("tokenizer", f"{meta['tokenizer']['spec']}, vocabulary {self.tokenizer.vocab_size}"),
            ("train", _describe_split(self.train)),
            ("held out", f"{_describe_split(self.held_out)} ({share})"),
            ("document length", _describe_lengths((self.train if self.train.n_documents else self.held_out).lengths)),
            ("bytes per token", f"{self.bytes_per_token:.3f} on held-out text"),
        ]
        taken = ", ".join(f"{count} {suffix}" for suffix, count in notes.taken.most_common())
        rows += [("files read", taken)] if taken else []
        rows += [("note", line) for line in notes.lines()]
        if not meta["lossless"]:
            rows.append(("note", "the tokenizer loses part of the text, which flatters bits per byte"))
        rows += [("encoded", str(self.throughput))] if self.throughput else []
        return [*rows, ("fingerprint", self.fingerprint[:16]), ("folder", str(self.path))]


def fingerprint_of(meta: dict[str, Any]) -> str:
    """The SHA-256 that names the data: its files' and its tokenizer's, wherever and whenever they were made."""
    hashes = {name: entry["sha256"] for name, entry in meta["files"].items()}
    content = [meta["format_version"], meta["tokenizer"]["fingerprint"], hashes]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads((path / META).read_text(encoding="utf-8"))
        version = meta["format_version"]
        if version in _READ and fingerprint_of(meta) != meta["fingerprint"]:
            raise ValueError("its fingerprint is not that of its files")
    except OSError as error:
        raise DataError(
            f"{path}: not a prepared dataset (no readable {META}); make one with `swamla prepare`"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptError(f"{path / META}: damaged ({error}); delete {path}") from error
    if version not in _READ:
        raise DataError(f"{path}: dataset format {version}, this swamla reads {FORMAT_VERSION}; delete it, or upgrade")
    if version == 1:  # of runs that go on with what they have: only what is held out, and what is noted, changed since
        meta["notes"] = {"counts": meta["notes"], "places": {}, "taken": {}}
    return meta


def _require_size(path: Path, size: int) -> None:
    actual = path.stat().st_size if path.is_file() else None
    if actual != size:
        state = "missing" if actual is None else f"{actual} bytes instead of {size}"
        raise CorruptError(f"{path}: damaged ({state}); delete {path.parent} to have it made again")


def _describe_split(split: Split) -> str:
    return f"{split.n_documents:,} documents, {split.n_tokens:,} tokens, {split.n_bytes:,} bytes"


def _describe_lengths(lengths: np.ndarray) -> str:
    shares = (5, 25, 50, 75, 95, 99)
    parts = ", ".join(
        f"{share} % {value:,.0f}" for share, value in zip(shares, np.percentile(lengths, shares), strict=True)
    )
    return f"{parts}, longest {lengths.max():,}, mean {lengths.mean():,.0f} tokens"
