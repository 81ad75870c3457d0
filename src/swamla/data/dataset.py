"""A prepared dataset: a folder of shards, their tokenizer, and meta.json with the size and SHA-256 of each file."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from swamla.data.config import DataConfig
from swamla.data.likeness import unseen_shares
from swamla.data.reading import Notes
from swamla.data.shards import HELD_OUT_TEXT, Encoded, Split
from swamla.data.tokenizer import Tokenizer, load_tokenizer
from swamla.errors import CorruptError, DataError
from swamla.files import sha256_of

if TYPE_CHECKING:
    from swamla.data.packing import Batch

FORMAT_VERSION = 2
_READ = (1, 2)
META, TOKENIZER = "meta.json", "tokenizer.json"


@dataclass(frozen=True)
class Throughput:
    """The throughput of an encoding. seconds: wall time, including reading and writing.  workers: processes."""

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
    """Training rows with random access: sample i depends on the data, the seed and i alone."""

    def batch(self, first_sample: int, count: int) -> "Batch":
        """Samples first_sample … first_sample + count - 1."""


class TrainingData(ABC):
    """What a run is trained on: texts (`Dataset`), rows of a task (`TaskDataset`), conversations (`ChatDataset`).

    tokenizer: ids to text and back.  fingerprint: a SHA-256 of all that decides the rows.
    """

    tokenizer: Tokenizer
    fingerprint: str

    @property
    def base(self) -> Tokenizer:
        """What `tokenizer` adds ids to: weights of its vocabulary may begin the run."""
        return self.tokenizer

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids that stand between texts and may be new: their rows are trained beside adapters."""
        return ()

    @property
    @abstractmethod
    def source(self) -> str:
        """Where the rows are from, for display."""

    @abstractmethod
    def rows(self, block_size: int, seed: int) -> Rows:
        """The endless training rows. Raises for a length that they cannot have."""

    @property
    @abstractmethod
    def bytes_per_label(self) -> float | None:
        """UTF-8 bytes of training text per position that carries loss; None where bytes have no meaning."""

    @abstractmethod
    def epochs(self) -> dict[str, int]:
        """Source → length of its epoch, in positions that carry loss; of a mixture, counted over all sources' rows."""

    @abstractmethod
    def identity(self) -> list[dict[str, str]]:
        """What a run stores to find its data again: for each source its fingerprint and what it was made of."""

    @abstractmethod
    def describe(self) -> list[tuple[str, str]]:
        """(label, value) rows for display."""


class Dataset(TrainingData):
    """Tokenized text, split into training and held-out documents.

    path: its folder, or the first of several.  fingerprint: a SHA-256 of the tokens, the split and the order of rows.
    """

    path: Path

    @staticmethod
    def open(path: str | Path) -> "PreparedDataset":
        """Open a folder that `prepare` made. Checks files' sizes and the tokenizer's fingerprint, not every byte.

        Raises DataError if the folder has no dataset, CorruptError for a damaged one.
        """
        return PreparedDataset.read(Path(path))

    @property
    @abstractmethod
    def train(self) -> Split:
        """The training documents."""

    @property
    @abstractmethod
    def held_out(self) -> Split:
        """The documents never trained on."""

    @property
    @abstractmethod
    def bytes_per_label(self) -> float:
        """UTF-8 bytes of training text per position that carries loss."""

    @abstractmethod
    def verify(self) -> None:
        """Check every byte against its SHA-256 and every id against the vocabulary; CorruptError names the file."""

    @abstractmethod
    def held_out_text(self) -> bytes:
        """All held-out documents, concatenated, in UTF-8: the input of other compressors in comparisons."""

    @cached_property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token of the held-out documents; ends of documents are not counted."""
        return self.held_out.n_bytes / self.held_out.n_tokens


class PreparedDataset(Dataset):
    """The dataset of one source, in one folder.

    meta: its meta.json.  throughput: of encoding; None if it came from the cache.  made_of: for `identity`, "raw", the
    digest of the source's files (`Source.digest`), and "plugin", the file that defines the source, if it is a plugin's.
    buffer_docs: as in `DataConfig`; since it changes the order of the text, it changes the fingerprint.
    """

    def __init__(
        self,
        path: Path,
        meta: dict[str, Any],
        tokenizer: Tokenizer,
        *,
        throughput: Throughput | None = None,
        made_of: Mapping[str, str] = MappingProxyType({}),
        buffer_docs: int = 0,
    ) -> None:
        self.path, self.meta, self.tokenizer = path, meta, tokenizer
        self.throughput, self.made_of, self.buffer_docs = throughput, made_of, buffer_docs
        fitted = f"{meta['fingerprint']} buffer_docs {buffer_docs}".encode()
        self.fingerprint = hashlib.sha256(fitted).hexdigest() if buffer_docs else meta["fingerprint"]

    @classmethod
    def read(
        cls,
        path: Path,
        *,
        source: str = "",
        throughput: Throughput | None = None,
        made_of: Mapping[str, str] = MappingProxyType({}),
        buffer_docs: int = 0,
        spec: str = "",
    ) -> "PreparedDataset":
        """Open a folder; see `Dataset.open`.

        source, spec: names of the source and the tokenizer to display, if others than those in meta.json.
        """
        meta = _read_meta(path)
        for name, entry in meta["files"].items():
            _require_size(path / name, entry["size"])
        tokenizer = load_tokenizer(path / TOKENIZER)
        if tokenizer.fingerprint != meta["tokenizer"]["fingerprint"]:
            raise CorruptError(
                f"{path / TOKENIZER}: not the tokenizer that these shards were made with (fingerprint "
                f"{tokenizer.fingerprint[:12]}, shards {meta['tokenizer']['fingerprint'][:12]}); delete {path}"
            )
        told = meta | ({"source": source} if source else {})
        told |= {"tokenizer": meta["tokenizer"] | {"spec": spec}} if spec else {}
        dataset = cls(path, told, tokenizer, throughput=throughput, made_of=made_of, buffer_docs=buffer_docs)
        assert dataset.train.vocab_size == dataset.held_out.vocab_size  # opens both, so that damage is reported now
        counted, there = dataset.held_out.n_bytes, meta["files"][HELD_OUT_TEXT]["size"]
        if counted != there:
            raise CorruptError(
                f"{path}: held_out.bytes.npy counts {counted} bytes of text, {HELD_OUT_TEXT} has {there}; delete {path}"
            )
        return dataset

    @property
    def source(self) -> str:
        return self.meta["source"]

    @cached_property
    def train(self) -> Split:
        return Split.open(self.path, "train", self.tokenizer.vocab_size)

    @cached_property
    def held_out(self) -> Split:
        return Split.open(self.path, "held_out", self.tokenizer.vocab_size)

    def rows(self, block_size: int, seed: int) -> Rows:
        from swamla.data.packing import BestFitRows, PackedRows  # needs torch

        if not self.train.n_documents:
            raise DataError(f"{self.source}: nothing to train on: all of its text is held out")
        if self.buffer_docs:
            return BestFitRows(self.train, block_size, seed, self.tokenizer.eos_id, self.buffer_docs)
        return PackedRows(self.train, block_size, seed, self.tokenizer.eos_id)

    @property
    def bytes_per_label(self) -> float:
        return self.train.n_bytes / (self.train.n_tokens + self.train.n_documents)

    def epochs(self) -> dict[str, int]:
        return {self.source: self.train.n_tokens + self.train.n_documents}

    def identity(self) -> list[dict[str, str]]:
        return [{"fingerprint": self.meta["fingerprint"], "raw": "", **self.made_of}]

    def verify(self) -> None:
        for name, entry in self.meta["files"].items():
            if sha256_of(self.path / name) != entry["sha256"]:
                raise CorruptError(f"{self.path / name}: damaged (SHA-256 differs); delete {self.path}")
        self.train.verify()
        self.held_out.verify()

    def held_out_text(self) -> bytes:
        return (self.path / HELD_OUT_TEXT).read_bytes()

    def describe(self) -> list[tuple[str, str]]:
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
            rows.append(("note", "the tokenizer loses part of the text: bits per byte are too low"))
        rows += [("encoded", str(self.throughput))] if self.throughput else []
        return [*rows, ("fingerprint", self.fingerprint[:16]), ("folder", str(self.path))]


def write_meta(
    folder: Path, config: DataConfig, origin: str, tokenizer: Tokenizer, rule: str, encoded: Encoded, notes: Notes
) -> None:
    """Write the meta.json of the shards in `folder`; a pure function of the data, not of the time or the workers.

    Raises DataError if the training or the held-out split is empty.
    """
    _require_documents(config, encoded, notes)
    meta = {
        "format_version": FORMAT_VERSION,
        "source": origin or config.source,
        "held_out_rule": rule,
        "tokenizer": {"spec": config.tokenizer, "fingerprint": tokenizer.fingerprint},
        "lossless": encoded.lossless,
        "notes": notes.plain(),
        "files": files_of(folder, but=(TOKENIZER,)),  # it has a fingerprint of its own
    }
    if (shares := unseen_shares(folder, tokenizer)) is not None:
        meta["unseen"] = shares
    meta["fingerprint"] = fingerprint_of(meta)
    (folder / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _require_documents(config: DataConfig, encoded: Encoded, notes: Notes) -> None:
    total = encoded.train + encoded.held_out
    if not total:
        left_out = "; ".join(notes.lines()) or "no rows"
        raise DataError(f"{config.source}: no text to learn from ({left_out})")
    fraction = config.held_out_fraction
    if total == 1 and fraction < 1:
        raise DataError(f"{config.source}: its only document is too short to hold a part of it out")
    for split, count, advice in (("held-out", encoded.held_out, "raise"), ("training", encoded.train, "lower")):
        if not count and fraction < 1:
            raise DataError(
                f"{config.source}: the {split} split is empty: of {total} documents, data.held_out_fraction = "
                f"{fraction} chose {encoded.held_out}; {advice} it"
            )


def files_of(folder: Path, but: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file in `folder`."""
    paths = sorted(path for path in folder.iterdir() if path.name not in but)
    return {path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in paths}


def fingerprint_of(meta: dict[str, Any]) -> str:
    """The SHA-256 that identifies the data: of the hashes of its files and its tokenizer."""
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
    if version == 1:  # from older runs; only the held-out rule and the notes changed since
        meta["notes"] = {"counts": meta["notes"], "places": {}, "taken": {}}
    return meta


def _require_size(path: Path, size: int) -> None:
    actual = path.stat().st_size if path.is_file() else None
    if actual != size:
        state = "missing" if actual is None else f"{actual} bytes instead of {size}"
        raise CorruptError(f"{path}: damaged ({state}); delete {path.parent} to prepare it again")


def _describe_split(split: Split) -> str:
    documents = f"{split.n_documents:,} document{'s' * (split.n_documents != 1)}"
    return f"{documents}, {split.n_tokens:,} tokens, {split.n_bytes:,} bytes"


def _describe_lengths(lengths: np.ndarray) -> str:
    shares = (5, 25, 50, 75, 95, 99)
    parts = ", ".join(
        f"{share} % {value:,.0f}" for share, value in zip(shares, np.percentile(lengths, shares), strict=True)
    )
    return f"{parts}, longest {lengths.max():,}, mean {lengths.mean():,.0f} tokens"
