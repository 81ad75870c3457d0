"""Parts of a report's sections: tables, maps of layers and heads, legends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from swamla.interpret.page.svg import heat_map

Data = Mapping[str, Any]
_NARROW = 6  # heads of a map up to which four maps fit beside each other


@dataclass(frozen=True)
class Map:
    """A map layer × head of a field of a section, on a scale that ends at `high`."""

    field: str
    title: str
    unit: str
    high: float = 1.0
    signed: bool = False


def table(head: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], meaning: str) -> str:
    """A table. head: (name, unit) of the columns.  meaning: what it says, in a line."""
    names = "".join(
        f'<th>{escape(name)} <span class="unit">{escape(unit) or "&nbsp;"}</span></th>' for name, unit in head
    )
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    caption = f"<caption>{escape(meaning)}</caption>"
    return f'<div class="scroll"><table>{caption}<thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def map_figure(data: Data, section: str, maps: Sequence[Map], caption: str) -> str:
    """Maps of a section, with their caption."""
    drawn = drawn_maps(data, section, maps)
    wide = " wide" if max(layer["heads"] for layer in data["layers"]) > _NARROW else ""
    return f'<figure><div class="maps{wide}">{drawn}</div><figcaption>{caption}</figcaption></figure>'


def drawn_maps(data: Data, section: str, maps: Sequence[Map]) -> str:
    """Maps with their titles and units."""
    labels = [name_of(data, index) for index in range(len(data["layers"]))]
    layers = data[section] if section == "layers" else data[section]["layers"]
    drawn = []
    for each in maps:
        rows = [layer[each.field] for layer in layers]
        place = section, each.field, each.unit
        svg = heat_map(rows, labels, title=each.title, high=each.high, signed=each.signed, place=place)
        drawn.append(f'<div><h3>{escape(each.title)}</h3><p class="note">{escape(each.unit)}</p>{svg}</div>')
    return "".join(drawn)


def legend(names: Sequence[tuple[str, str]], *, square: bool = False) -> str:
    """(name, colour) of curves, or of areas where `square`."""
    kind = ' class="square"' if square else ""
    spans = "".join(f'<span><i{kind} style="background:{colour}"></i>{escape(name)}</span>' for name, colour in names)
    return f'<p class="legend">{spans}</p>'


def visible(token: str) -> str:
    """A token with signs for line ends and tabs."""
    return token.replace("\n", "⏎").replace("\t", "⇥")


def name_of(data: Data, index: int) -> str:
    """A layer's number and mixer."""
    return f"{index} {data['layers'][index]['mixer']}"


def signed(value: float | None) -> str:
    """A figure of three decimals with its sign, "–" for none."""
    return "–" if value is None else "0.000" if round(value, 3) == 0 else f"{value:+.3f}".replace("-", "−")
