"""The configuration of a run's data: its source, its held-out split, its tokenizer."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from swamla.errors import require
from swamla.tasks import HELD_OUT, PREFIX, Task, parse

BYTES = 256
MIXTURE = "mixture"
TOKEN_IDS = "token_ids"
NAMES = "names"
CHAT = "chat:"  # before the path of a file of conversations
_BPE = re.compile(r"bpe(?P<lines>-lines)?:(?P<size>\d{1,9})")
_IDS = re.compile(r"ids:(?P<count>[1-9]\d{0,8})")


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
        whole = self.source in (MIXTURE, TOKEN_IDS) or self.source.startswith(PREFIX)
        require(not whole, "source", self.source, "a mixture cannot contain another, a task, nor ids given from Python")
        require(not self.source.startswith(CHAT), "source", self.source, "a mixture cannot contain conversations")
        require(self.weight > 0, "weight", self.weight, "must be > 0, e.g. 0.3")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data of a run.

    source: "stdlib" (this Python's own library), "shakespeare" (downloaded once), "hf:OWNER/NAME" (a dataset on the
        hub), "mixture", or the path of a text file, of rows, or of a folder of them; rows are .jsonl, .ndjson, .json,
        .csv, .tsv or .parquet. All may be compressed (.gz, .zst, .xz, .bz2). "files:PATH" is a path even if it reads
        like another kind. "token_ids" are documents of ids, given from Python: `prepare(config, token_ids=…)`.
        "task:KIND?SIZE=N&…" are the endless rows of a task, as "task:mqar?pairs=8&length=64". "chat:FILE" are the
        conversations of a .jsonl or .json file, of which only the answers are learned.
    text_column: the column of rows that holds the text.
    hub_config: the config of a hub dataset, e.g. CC-MAIN-2024-10; empty for its default.
    hub_split: the split of a hub dataset.
    hub_revision: the commit, branch or tag to read; empty for the newest.
    tokenizer: "byte", "char", "bpe:N" or "bpe-lines:N" (trained here, vocabulary N), "gpt2" or "hub:NAME" (fetched),
        "gpt2:FOLDER" (encoder.json and vocab.bpe), or the path of a tokenizer.json. "ids:N" for ids 0 … N - 1 without
        a tokenizer: their text is the numbers themselves, as in " 17 5 23". "names" for a task, whose ids have names.
    held_out_fraction: the share of documents never trained on; they are chosen by a hash of their text. A single
        document is cut instead, and its last characters are held out. 1 holds out everything, for a test set, which
        needs a tokenizer that exists already. Of a task it is always 0.05 of all rows that there can be.
    invalid_utf8: whether bytes that are not UTF-8 are an error or replaced by U+FFFD and counted.
    on_bad_row: whether a row (or a text file of a folder) that cannot be used is an error, or skipped and counted.
    stream: tokenize during training, and shuffle this many units (of about 8 MB of text) together; little of the
        source is kept on disk. 0 prepares the whole source before training.
    buffer_docs: best-fit packing of this many documents at a time, so that few are cut; rows may end in padding. 0
        fills every row and cuts documents at its end.
    mixture: sources with weights, for source = "mixture".
    template: how a conversation becomes one text: "chatml", <|im_start|>ROLE, its text, <|im_end|>; or "plain", a
        prompt, then its completion, nothing between them.
    on_long_row: whether a conversation longer than a row of tokens is an error, cut at the row's end, or skipped and
        counted.
    cache_dir: the folder of prepared data; empty for $SWAMLA_CACHE, else ~/.cache/swamla.
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
    template: Literal["chatml", "plain"] = "chatml"
    on_long_row: Literal["stop", "cut", "skip"] = "stop"
    cache_dir: str = ""

    def __post_init__(self) -> None:
        _check_source(self)
        require(self.stream >= 0, "stream", self.stream, "must be >= 0, e.g. 4; 0 prepares everything first")
        require(self.buffer_docs >= 0, "buffer_docs", self.buffer_docs, "must be >= 0, e.g. 1000; 0 fills every row")
        both = bool(self.stream and self.buffer_docs)
        require(not both, "buffer_docs", self.buffer_docs, "needs prepared data: leave data.stream at 0")
        mixed = self.source == MIXTURE
        require(mixed or not self.mixture, "source", self.source, f'must be "{MIXTURE}" where data.mixture is given')
        require(not mixed or bool(self.mixture), "mixture", (), "needs [[data.mixture]] tables of source and weight")
        fraction = self.held_out_fraction
        require(0 < fraction <= 1, "held_out_fraction", fraction, "must be between 0 and 1, e.g. 0.05")
        learned = fraction == 1 and self.tokenizer.startswith(("bpe:", "bpe-lines:"))
        require(not learned, "tokenizer", self.tokenizer, "cannot be trained where all text is held out")
        require(fraction < 1 or not self.stream, "stream", self.stream, "must be 0 where all text is held out")
        if self.source == TOKEN_IDS:
            trained = self.tokenizer == "char" or self.tokenizer.startswith(("bpe:", "bpe-lines:"))
            known = 'made the ids already: name what made them, e.g. ids:N for none, "gpt2", or the path of a file'
            require(not trained, "tokenizer", self.tokenizer, known)
            require(not self.stream, "stream", self.stream, "must be 0 where ids are given from Python")
        self._check_task()
        self._check_chat()
        policies = ("error", "replace")
        require(self.on_bad_row in ("stop", "skip"), "on_bad_row", self.on_bad_row, "must be stop or skip")
        require(self.invalid_utf8 in policies, "invalid_utf8", self.invalid_utf8, "must be error or replace")
        require(bool(self.tokenizer), "tokenizer", self.tokenizer, "needs e.g. byte, char, bpe:4096 or a path")
        if self.tokenizer.startswith(("bpe:", "bpe-lines:")):
            parse_bpe(self.tokenizer)
        parse_ids(self.tokenizer)

    def _check_task(self) -> None:
        """Check the task, and that it has no setting of texts."""
        named = self.tokenizer == NAMES
        if self.task is None:
            require(
                not named, "tokenizer", self.tokenizer, f'is for a task, such as "{PREFIX}mqar"; texts need e.g. byte'
            )
            return
        require(named, "tokenizer", self.tokenizer, f'must be "{NAMES}" for a task: its ids have names')
        fraction = self.held_out_fraction
        require(fraction == HELD_OUT, "held_out_fraction", fraction, f"must be {HELD_OUT} for a task")
        for name in ("stream", "buffer_docs"):
            require(not self.__dict__[name], name, self.__dict__[name], "must be 0 for a task, which has no documents")

    def _check_chat(self) -> None:
        """Check the settings of conversations, and that these have no setting of texts that does not apply."""
        require(self.template in ("chatml", "plain"), "template", self.template, "must be chatml or plain")
        long_rows = self.on_long_row
        require(long_rows in ("stop", "cut", "skip"), "on_long_row", long_rows, "must be stop, cut or skip")
        if self.chat is None:
            for name, default in (("template", "chatml"), ("on_long_row", "stop")):
                value = self.__dict__[name]
                require(value == default, name, value, f'is for conversations: source = "{CHAT}FILE"')
            return
        require(bool(self.chat), "source", self.source, f"needs a file of conversations, e.g. {CHAT}chat.jsonl")
        learned = self.tokenizer.startswith(("bpe:", "bpe-lines:")) or self.tokenizer == "char"
        require(not learned, "tokenizer", self.tokenizer, "must exist already for conversations: that of the weights")
        require(not self.stream, "stream", self.stream, "must be 0 for conversations")

    @property
    def chat(self) -> str | None:
        """The file of conversations; None for other data."""
        return self.source.removeprefix(CHAT) if self.source.startswith(CHAT) else None

    @property
    def task(self) -> Task | None:
        """The task whose rows are the data; None for texts."""
        return parse(self.source) if self.source.startswith(PREFIX) else None

    @property
    def cache(self) -> Path:
        """The folder of prepared datasets and downloads."""
        return Path(self.cache_dir).expanduser() if self.cache_dir else default_cache_dir()

    @property
    def sources(self) -> list["DataConfig"]:
        """One config per source of a mixture; without a mixture, this config alone."""
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
    """(vocabulary size, whether merges may span words of a line) of "bpe:4096" or "bpe-lines:4096"; None for others.

    Raises ConfigError for a vocabulary below 257, the 256 bytes and the end-of-document token, or above a million.
    """
    match = _BPE.fullmatch(spec)
    if match is None:
        require(not spec.startswith(("bpe:", "bpe-lines:")), "tokenizer", spec, "must be like bpe:4096")
        return None
    size = int(match["size"])
    require(BYTES < size <= 1_000_000, "tokenizer", spec, "vocabulary must be from 257 to 1000000, e.g. bpe:4096")
    return size, match["lines"] is not None


def parse_ids(spec: str) -> int | None:
    """N of "ids:N"; None for other tokenizers. Raises ConfigError for N below 1 or from 10⁹ on."""
    match = _IDS.fullmatch(spec)
    require(match is not None or not spec.startswith("ids:"), "tokenizer", spec, "must be like ids:50, N ids from 0")
    return None if match is None else int(match["count"])


def default_cache_dir() -> Path:
    """$SWAMLA_CACHE, else ~/.cache/swamla."""
    return Path(os.environ.get("SWAMLA_CACHE") or "~/.cache/swamla").expanduser()
