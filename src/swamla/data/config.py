"""What text to learn from, how it is split and how it becomes tokens."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from swamla.errors import require

BYTES = 256
MIXTURE = "mixture"
_BPE = re.compile(r"bpe(?P<lines>-lines)?:(?P<size>\d{1,9})")


@dataclass(frozen=True, kw_only=True)
class WeightedSource:
    """A source of a mixture.

    weight: its share of the rows, before the weights are divided by their sum.
    source, text_column, hub_config, hub_split, hub_revision: as in `DataConfig`.
    """

    source: str
    weight: float
    text_column: str = "text"
    hub_config: str = ""
    hub_split: str = "train"
    hub_revision: str = ""

    def __post_init__(self) -> None:
        _check_source(self)
        require(self.source != MIXTURE, "source", self.source, "a mixture cannot hold another")
        require(self.weight > 0, "weight", self.weight, "must be > 0, e.g. 0.3")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data of a run.

    source: "stdlib" (this Python's own library), "shakespeare" (downloaded once), "hf:OWNER/NAME" (a dataset on the
        hub), "mixture", or the path of a text file, of rows, or of a folder of them; rows are .jsonl, .ndjson, .json,
        .csv, .tsv or .parquet, and all may be compressed (.gz, .zst, .xz, .bz2).
    text_column: the column of rows that holds the text.
    hub_config: which of a hub dataset's configs, e.g. CC-MAIN-2024-10; empty for its default.
    hub_split: which split of it.
    hub_revision: the commit (or branch or tag) that is read; empty for what is newest.
    tokenizer: "byte", "char", "bpe:N" or "bpe-lines:N" (trained here, vocabulary N), "gpt2" or "hub:NAME" (fetched),
        "gpt2:FOLDER" (encoder.json and vocab.bpe), or the path of a tokenizer.json.
    held_out_fraction: the share of documents never trained on, told by their text; of a single document, its last
        characters. 1 holds out everything: a test set, for which the tokenizer has to exist already.
    invalid_utf8: whether bytes that are not UTF-8 are an error or replaced by U+FFFD and counted.
    on_bad_row: whether a row (or a text file of a folder) that cannot be used is an error, or skipped and counted.
    stream: how many units (of some 8 MB of text) are shuffled together while training reads the source bit by bit and
        keeps little of it; 0 prepares all of it first.
    buffer_docs: how many documents are fitted into rows together so that few are cut; rows may then end in padding. 0
        fills every row and cuts documents at its end.
    mixture: sources with weights, for source = "mixture".
    cache_dir: where prepared data is kept; empty for $SWAMLA_CACHE, else ~/.cache/swamla.
    """

    source: str = "stdlib"
    text_column: str = "text"
    hub_config: str = ""
    hub_split: str = "train"
    hub_revision: str = ""
    tokenizer: str = "bpe:4096"
    held_out_fraction: float = 0.05
    invalid_utf8: Literal["error", "replace"] = "error"
    on_bad_row: Literal["stop", "skip"] = "stop"
    stream: int = 0
    buffer_docs: int = 0
    mixture: tuple[WeightedSource, ...] = ()
    cache_dir: str = ""

    def __post_init__(self) -> None:
        _check_source(self)
        require(self.stream >= 0, "stream", self.stream, "must be >= 0, e.g. 4; 0 prepares everything first")
        require(self.buffer_docs >= 0, "buffer_docs", self.buffer_docs, "must be >= 0, e.g. 1000; 0 fills every row")
        both = bool(self.stream and self.buffer_docs)
        require(not both, "buffer_docs", self.buffer_docs, "needs prepared data, and data.stream was asked for")
        mixed = self.source == MIXTURE
        require(mixed or not self.mixture, "source", self.source, f'must be "{MIXTURE}" where data.mixture is given')
        require(not mixed or bool(self.mixture), "mixture", (), "needs [[data.mixture]] tables of source and weight")
        fraction = self.held_out_fraction
        require(0 < fraction <= 1, "held_out_fraction", fraction, "must be between 0 and 1, e.g. 0.05")
        learned = fraction == 1 and self.tokenizer.startswith(("bpe:", "bpe-lines:"))
        require(not learned, "tokenizer", self.tokenizer, "has nothing to learn from where all text is held out")
        require(fraction < 1 or not self.stream, "stream", self.stream, "trains, and all text is held out: leave it 0")
        policies = ("error", "replace")
        require(self.on_bad_row in ("stop", "skip"), "on_bad_row", self.on_bad_row, "must be stop or skip")
        require(self.invalid_utf8 in policies, "invalid_utf8", self.invalid_utf8, "must be error or replace")
        require(bool(self.tokenizer), "tokenizer", self.tokenizer, "needs e.g. byte, char, bpe:4096 or a path")
        if self.tokenizer.startswith(("bpe:", "bpe-lines:")):
            parse_bpe(self.tokenizer)

    @property
    def cache(self) -> Path:
        """The folder in which `prepare` keeps what it makes and downloads."""
        return Path(self.cache_dir).expanduser() if self.cache_dir else default_cache_dir()

    @property
    def sources(self) -> list["DataConfig"]:
        """The sources of a mixture, each as if it were alone; of any other data itself."""
        return [
            replace(self, mixture=(), **{name: value for name, value in part.__dict__.items() if name != "weight"})
            for part in self.mixture
        ] or [self]


def _check_source(config: "DataConfig | WeightedSource") -> None:
    require(bool(config.source), "source", config.source, "needs a path, or one of: stdlib, shakespeare")
    require("\0" not in config.source, "source", config.source, "a path cannot hold NUL")
    hub = config.source.startswith("hf:")
    named = re.fullmatch(r"hf:[\w.-]+/[\w.-]+", config.source)
    require(not hub or named is not None, "source", config.source, "must be like hf:HuggingFaceFW/fineweb-edu")
    for field, default in (("hub_config", ""), ("hub_split", "train"), ("hub_revision", "")):
        value = getattr(config, field)
        require(hub or value == default, field, value, 'is for sources of the hub, such as "hf:OWNER/NAME"')
    require(bool(config.hub_split), "hub_split", config.hub_split, "needs a split's name, e.g. train")
    require(bool(config.text_column), "text_column", config.text_column, "needs a column's name, e.g. text")


def parse_bpe(spec: str) -> tuple[int, bool] | None:
    """(vocabulary, whether merges may span a whole line) of "bpe:4096" or "bpe-lines:4096"; None for other specs.

    Raises ConfigError for a vocabulary that cannot be: it holds 256 bytes and the end of a document at least.
    """
    match = _BPE.fullmatch(spec)
    if match is None:
        require(not spec.startswith(("bpe:", "bpe-lines:")), "tokenizer", spec, "must be like bpe:4096")
        return None
    size = int(match["size"])
    require(BYTES < size <= 1_000_000, "tokenizer", spec, "vocabulary must be from 257 to 1000000, e.g. bpe:4096")
    return size, match["lines"] is not None


def default_cache_dir() -> Path:
    """$SWAMLA_CACHE, else ~/.cache/swamla."""
    return Path(os.environ.get("SWAMLA_CACHE") or "~/.cache/swamla").expanduser()
