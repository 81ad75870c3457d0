"""What grows in stages over a run: the sequence length (`curriculum`) and the rows of a step (`batch_ramp`)."""

import re
from dataclasses import dataclass
from typing import Self

from swamla.data.packing import Batch
from swamla.errors import ConfigError, require

LENGTHS = ("curriculum", "LENGTH", "block_size", 'e.g. "512:500M,1024:2B,2048:inf" or "128:0.3,512:inf"')
ROWS = ("batch_ramp", "ROWS", "batch_size", 'e.g. "2:0.1,4:0.3,8:inf" or "8:500M,32:inf"')
_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_STAGE = re.compile(r"(\d+):(inf|(\d+(?:\.\d+)?)([KMB]?))", re.IGNORECASE)


@dataclass(frozen=True)
class Stages:
    """values: of each stage.  ends: where each but the last ends: tokens of the run, or shares of it (by_share)."""

    values: tuple[int, ...]
    ends: tuple[float, ...] = ()
    by_share: bool = False

    @classmethod
    def lengths(cls, text: str, block_size: int) -> Self:
        """Read "length:tokens,length:tokens,…,length:inf"; "" is one stage of `block_size`.

        Raises `ConfigError` for other text, and for lengths that do not divide `block_size`.
        """
        stages = cls._parse(text, block_size, *LENGTHS)
        for each in stages.values:
            fits = each > 0 and block_size % each == 0
            require(fits, "curriculum", each, f"every length must divide block_size = {block_size}")
        return stages

    @classmethod
    def rows(cls, text: str, batch_size: int) -> Self:
        """Read "rows:tokens,…,rows:inf"; "" is one stage of `batch_size`, which no stage exceeds. Raises as above."""
        stages = cls._parse(text, batch_size, *ROWS)
        for each in stages.values:
            require(0 < each <= batch_size, "batch_ramp", each, f"must be 1 … batch_size = {batch_size}")
        return stages

    @classmethod
    def _parse(cls, text: str, last_value: int, field: str, unit: str, last_field: str, example: str) -> Self:
        if not text:
            return cls((last_value,))
        values: list[int] = []
        ends: list[float] = []
        *before, last = text.replace(" ", "").split(",")
        for stage in before:
            value, span = _parse_stage(stage, field, unit, example)
            require(span is not None, field, stage, f"only the last stage lasts for ever, {example}")
            values.append(value)
            ends.append((ends[-1] if ends else 0) + (span or 0))
        value, span = _parse_stage(last, field, unit, example)
        require(span is None, field, last, f"the last stage must last for ever, {value}:inf, {example}")
        require(value == last_value, field, last, f"the last {unit.lower()} must be {last_field} = {last_value}")
        by_share = bool(ends) and ends[0] < 1
        mixed = by_share and any(end >= 1 for end in ends)
        require(not mixed, field, text, f"shares of the run must add up to less than 1, without tokens, {example}")
        whole = all(end == int(end) for end in ends) or by_share
        require(whole, field, text, f"either every stage has tokens, or every one a share of the run, {example}")
        return cls((*values, value), tuple(ends), by_share)

    def at(self, tokens: int, progress: float) -> int:
        """The value of a step that begins after `tokens` tokens, and the share `progress`, of the run."""
        position = progress if self.by_share else tokens
        return self.values[sum(end <= position for end in self.ends)]


def _parse_stage(text: str, field: str, unit: str, example: str) -> tuple[int, float | None]:
    """The value of a stage, and its tokens, or its share of the run, below 1; None for ever."""
    found = _STAGE.fullmatch(text)
    if not found:
        raise ConfigError(field, text, f"must be {unit}:TOKENS, tokens with K, M, B or inf, {example}")
    value = int(found[1])
    if found[3] is None:
        return value, None
    number = float(found[3])
    span = number if 0 < number < 1 and not found[4] else round(number * _SUFFIXES[found[4].upper()])
    require(span > 0, field, text, f"a stage must last for at least one token, {example}")
    return value, span


def cut(batch: Batch, length: int) -> Batch:
    """The batch cut into rows of `length`, which divides its own length; a document restarts at every cut."""
    return Batch(*(x.reshape(-1, length) for x in (batch.tokens_BT, batch.labels_BT, batch.document_BT)))
