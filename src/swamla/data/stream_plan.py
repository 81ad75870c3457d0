"""What a stream's units are, kept beside them: a run goes on with it though its files moved, or a row was mended."""

import json
from dataclasses import dataclass
from pathlib import Path

from swamla.data.rows import Span
from swamla.data.sources import Source, kind_of
from swamla.data.units import Unit
from swamla.errors import CorruptError, DataError
from swamla.files import read_json, write_text_atomically

FILE = "stream.json"


@dataclass(frozen=True)
class StreamPlan:
    """sample: the fingerprint of the prepared sample.  key: of the whole, as long as nobody changes it.

    names: of the source's files.  units: of its text.
    """

    sample: str
    key: str
    names: tuple[str, ...]
    units: tuple[Unit, ...]

    @classmethod
    def of(cls, source: Source, units: list[Unit], sample: str) -> "StreamPlan":
        """The plan of a stream that begins now."""
        key = json.dumps([sample, [entry.size for entry in source.entries], len(units)])
        return cls(sample, key, tuple(entry.name for entry in source.entries), tuple(units))

    def write(self, folder: Path) -> None:
        """Keep the plan beside its units."""
        plain = {"sample": self.sample, "key": self.key, "names": self.names, "units": self.units}
        write_text_atomically(folder / FILE, json.dumps(plain))

    @classmethod
    def read(cls, folder: Path) -> "StreamPlan":
        """The plan kept in `folder`. CorruptError if it cannot be read."""
        plain = read_json(folder / FILE, inside=folder)
        try:
            units = (Unit(first, stop, span and (span[0], span[1])) for first, stop, span in plain["units"])
            return cls(plain["sample"], plain["key"], tuple(plain["names"]), tuple(units))
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"{folder / FILE}: damaged ({error!r}); delete {folder}") from error

    def units_of(self, source: Source) -> tuple[Unit, ...]:
        """The units, whose last spans reach to the end of files that grew. DataError if there are other files now."""
        names = tuple(entry.name for entry in source.entries)
        if names != self.names:
            other = sorted(set(names) ^ set(self.names))[:3]
            raise DataError(
                f"{source.name}: files came or went since the run began ({', '.join(other)}): what is streamed needs "
                "the same files; restore them, or start a new run"
            )
        last = {unit.first: unit for unit in self.units if unit.span}
        return tuple(_to_the_end(unit, source) if last.get(unit.first) is unit else unit for unit in self.units)


def _to_the_end(unit: Unit, source: Source) -> Unit:
    entry = source.entries[unit.first]
    if unit.span is None or kind_of(entry.name) == ".parquet":
        return unit
    span: Span = (unit.span[0], max(unit.span[1], entry.size))
    return unit._replace(span=span)
