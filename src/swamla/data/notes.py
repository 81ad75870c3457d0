"""What reading a source left out, changed and took: counted, with the first places, for people and for meta.json."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

_PLACES, _SHOWN = 5, 3  # kept in meta.json, and told


class Notes:
    """counts: of what was left out or changed.  places: the first of each.  taken: files read, by their suffixes."""

    def __init__(self, plain: Mapping[str, Any] | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}
        self.taken: Counter[str] = Counter()
        if plain is not None:
            self.include(plain)

    def add(self, what: str, where: object = None, count: int = 1) -> None:
        """Count `what`, and keep where it was (put into words only then) as one of the first places."""
        self.counts[what] += count
        if where is not None and len(self.places.get(what, ())) < _PLACES:
            self.places.setdefault(what, []).append(str(where))

    def include(self, plain: Mapping[str, Any]) -> None:
        """Add what `plain` made of others; their places come after those that are known."""
        self.counts.update(plain["counts"])
        self.taken.update(plain["taken"])
        for what, places in plain["places"].items():
            self.places[what] = [*self.places.get(what, ()), *places][:_PLACES]

    def plain(self) -> dict[str, Any]:
        """As JSON data, the same for the same notes."""
        return {
            "counts": dict(sorted(self.counts.items())),
            "places": dict(sorted(self.places.items())),
            "taken": dict(sorted(self.taken.items())),
        }

    def lines(self) -> list[str]:
        """A line for each thing that was left out or changed."""
        return [f"{count} {what}{_named(self.places.get(what, []), count)}" for what, count in self.counts.items()]


def _named(places: list[str], count: int) -> str:
    more = " …" if count > _SHOWN else ""
    return f": {'; '.join(places[:_SHOWN])}{more}" if places else ""
