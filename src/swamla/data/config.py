"""What text to learn from, how it is split and how it becomes tokens."""

import re
from dataclasses import dataclass
from typing import Literal

from swamla.errors import require

BYTES = 256
_BPE = re.compile(r"bpe(?P<lines>-lines)?:(?P<size>\d{1,9})")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data of a run.

    source: "stdlib" (this Python's own library), "shakespeare" (downloaded once), the path of a text file, a .jsonl or
        .parquet file, any of these as .gz or .zst, or a folder of them, or "hf:OWNER/NAME", a dataset on the hub.
    text_column: the column of jsonl and parquet rows that holds the text.
    hub_config: which of a hub dataset's configs, e.g. CC-MAIN-2024-10; empty for its default.
    hub_split: which split of it.
    hub_revision: the commit (or branch or tag) that is read; empty for what is newest.
    tokenizer: "byte", "char", "bpe:N" or "bpe-lines:N" (trained here, vocabulary N), "gpt2" or "hub:NAME" (fetched),
        "gpt2:FOLDER" (encoder.json and vocab.bpe), or the path of a tokenizer.json.
    held_out_fraction: the share of documents never trained on; of a single document, its last characters.
    invalid_utf8: whether bytes that are not UTF-8 are an error or replaced by U+FFFD and counted.
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
    cache_dir: str = ""

    def __post_init__(self) -> None:
        require(bool(self.source), "source", self.source, "needs a path, or one of: stdlib, shakespeare")
        require("\0" not in self.source, "source", self.source, "a path cannot hold NUL")
        hub = self.source.startswith("hf:")
        named = re.fullmatch(r"hf:[\w.-]+/[\w.-]+", self.source)
        require(not hub or named is not None, "source", self.source, "must be like hf:HuggingFaceFW/fineweb-edu")
        for field, value in (("hub_config", self.hub_config), ("hub_revision", self.hub_revision)):
            require(hub or not value, field, value, 'is for sources of the hub, such as "hf:OWNER/NAME"')
        require(bool(self.hub_split), "hub_split", self.hub_split, "needs a split's name, e.g. train")
        require(bool(self.text_column), "text_column", self.text_column, "needs a column's name, e.g. text")
        fraction = self.held_out_fraction
        require(0 < fraction < 1, "held_out_fraction", fraction, "must be between 0 and 1, e.g. 0.05")
        policies = ("error", "replace")
        require(self.invalid_utf8 in policies, "invalid_utf8", self.invalid_utf8, "must be error or replace")
        require(bool(self.tokenizer), "tokenizer", self.tokenizer, "needs e.g. byte, char, bpe:4096 or a path")
        if self.tokenizer.startswith(("bpe:", "bpe-lines:")):
            parse_bpe(self.tokenizer)


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
