"""A data source in one file: sums, written out by rule."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import swamla
from swamla.data.config import DataConfig
from swamla.data.reading import Notes
from swamla.data.rows import Span
from swamla.data.sources import Entry, Source
from swamla.errors import require

RULE = 1  # to be raised when the texts change
TOGETHER = 50  # documents of an entry


@swamla.register
@dataclass(frozen=True, kw_only=True)
class ToySource(Source):
    """Documents of ten sums: `--data toy_text`, or as many as one likes: `--data toy_text:500`."""

    kind: ClassVar[str] = "toy_text"

    @classmethod
    def open(cls, text: str, config: DataConfig, cache_dir: Path) -> Self:
        """Entries of fifty documents each."""
        known = not text or (text.isdecimal() and 0 < int(text) <= 1_000_000)
        require(known, "data.source", config.source, "must be toy_text, or toy_text:COUNT, e.g. toy_text:500")
        count = int(text or 300)
        firsts = range(0, count, TOGETHER)
        stops = [min(first + TOGETHER, count) for first in firsts]
        entries = (
            Entry(f"{first:07d}", f"toy text {first} to {stop - 1}", 150 * (stop - first), (RULE, first, stop))
            for first, stop in zip(firsts, stops, strict=True)
        )
        return cls(name="toy_text", entries=tuple(entries))

    def read(self, entry: Entry, notes: Notes, span: Span | None = None) -> Iterator[str]:
        """Each document's text."""
        _, first, stop = entry.state
        for number in range(int(first), int(stop)):
            yield "".join(f"{number} and {n} are {number + n}\n" for n in range(10))
        notes.taken["sums"] += 1
