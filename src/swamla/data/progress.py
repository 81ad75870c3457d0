"""How far the reading of a source has come."""

from collections.abc import Iterator
from pathlib import Path

from swamla.data.reading import COMPRESSED, Notes
from swamla.data.sources import EXPANSION, Entry, Source, Unit

_PACKED = (*COMPRESSED, ".parquet")


class Reading:
    """One pass over a source's documents. share: of the source that was read, 0 … 1.

    Whole files count by their sizes. Within a file the share is an estimate from the text that came out of it.
    """

    def __init__(self, source: Source) -> None:
        self.source, self.share = source, 0.0

    def documents(self, notes: Notes) -> Iterator[str]:
        """All nonempty documents of the source, as `Source.documents` yields them."""
        total = max(1, sum(entry.size for entry in self.source.entries))
        before = 0
        for index, entry in enumerate(self.source.entries):
            characters, expected = 0, max(1, expected_text(entry))
            for text in self.source.unit_documents(Unit(index, index + 1), notes):
                characters += len(text)
                self.share = (before + entry.size * min(1.0, characters / expected)) / total
                yield text
            before += entry.size
            self.share = before / total


def expected_text(entry: Entry) -> int:
    """About how many characters of text an entry has."""
    return entry.size * (EXPANSION if Path(entry.name).suffix.lower() in _PACKED else 1)
