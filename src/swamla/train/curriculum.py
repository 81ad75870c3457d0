"""Sequence-length curriculum: shorter rows first, in stages counted in tokens."""

import re
from dataclasses import dataclass
from typing import Self

from swamla.data.packing import Batch
from swamla.errors import ConfigError, require

EXAMPLE = 'e.g. "512:500M,1024:2B,2048:inf"'
_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_STAGE = re.compile(r"(\d+):(inf|(\d+(?:\.\d+)?)([KMB]?))", re.IGNORECASE)


@dataclass(frozen=True)
class Curriculum:
    """lengths: sequence length of each stage.  ends: tokens of the run at which each stage but the last ends."""

    lengths: tuple[int, ...]
    ends: tuple[int, ...]

    @classmethod
    def parse(cls, text: str, block_size: int) -> Self:
        """Read "length:tokens,length:tokens,…,length:inf"; "" is one stage of `block_size`.

        Raises `ConfigError` for other text, and for lengths that do not divide `block_size`.
        """
        if not text:
            return cls((block_size,), ())
        lengths: list[int] = []
        ends: list[int] = []
        *before, last = text.replace(" ", "").split(",")
        for stage in before:
            length, tokens = _parse_stage(stage)
            require(tokens is not None, "curriculum", stage, f"only the last stage lasts for ever, {EXAMPLE}")
            lengths.append(length)
            ends.append((ends[-1] if ends else 0) + (tokens or 0))
        length, tokens = _parse_stage(last)
        require(tokens is None, "curriculum", last, f"the last stage must last for ever, {length}:inf, {EXAMPLE}")
        require(length == block_size, "curriculum", last, f"the last length must be block_size = {block_size}")
        for each in lengths:
            fits = each > 0 and block_size % each == 0
            require(fits, "curriculum", each, f"every length must divide block_size = {block_size}")
        return cls((*lengths, length), tuple(ends))

    def length(self, tokens: int) -> int:
        """The sequence length of a step that begins after `tokens` tokens of the run."""
        return self.lengths[sum(end <= tokens for end in self.ends)]


def _parse_stage(text: str) -> tuple[int, int | None]:
    """The length of a stage, and its tokens; None for ever."""
    found = _STAGE.fullmatch(text)
    if not found:
        raise ConfigError("curriculum", text, f"must be LENGTH:TOKENS, tokens with K, M, B or inf, {EXAMPLE}")
    length = int(found[1])
    if found[3] is None:
        return length, None
    tokens = round(float(found[3]) * _SUFFIXES[found[4].upper()])
    require(tokens > 0, "curriculum", text, f"a stage must last for at least one token, {EXAMPLE}")
    return length, tokens


def cut(batch: Batch, length: int) -> Batch:
    """The batch cut into rows of `length`, which divides its own length; a document restarts at every cut."""
    return Batch(*(x.reshape(-1, length) for x in (batch.tokens_BT, batch.labels_BT, batch.document_BT)))
