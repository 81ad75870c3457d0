"""Charts of a report as inline SVG. What the pointer shows of a mark is its attribute data-tip."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Colours that colour-blind people can tell apart too (Okabe and Ito).
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
_DARK, _RED = (8, 64, 140), (178, 24, 43)  # the deep ends of the scale: positive, and negative
_LETTER, _LINE = 7.0, 15.0  # width of a letter of labels and distance of their lines, in pixels
_MANY = 24  # rows of a map, beyond which they are narrower
_FINE = 10.0  # pixels of a cell, below which its frame would hide it
_WIDE_CELL, _CELLS_WIDE = 30.0, 300.0  # the width of a cell, and the most that the cells of a row take together


def shade(share: float) -> str:
    """A colour between white (0) and dark blue (1): one hue, so that more is darker in print too."""
    return _between(_DARK, share)


def shade_signed(share: float) -> str:
    """A colour between dark red (−1), white (0) and dark blue (1), which colour-blind people tell apart."""
    return _between(_DARK if share >= 0 else _RED, abs(share))


def _between(dark: tuple[int, int, int], share: float) -> str:
    share = min(1.0, max(0.0, share))
    red, green, blue = (round(255 + (deep - 255) * share) for deep in dark)
    return f"#{red:02x}{green:02x}{blue:02x}"


def number(value: float | None, digits: int = 3) -> str:
    """A figure as papers print it: .57, 2.22, 13.1, 1,240, whole numbers as they are; "–" for none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == int(value):
        return f"{int(value):,}".replace("-", "−")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if abs(value) >= 1 else digits - 1
    text = f"{value:,.{decimals}f}"
    if float(text.replace(",", "")) == 0:
        return "0"
    text = text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text
    return text.replace("-", "−")


def heat_map(
    rows: Sequence[Sequence[float | None]],
    labels: Sequence[str],
    *,
    title: str,
    high: float,
    signed: bool = False,
    columns: Sequence[str] = (),
    place: tuple[str, str, str] | None = None,
    tips: Sequence[Sequence[str]] = (),
) -> str:
    """A map of figures on one scale from 0 to `high`, or from −high where `signed`; a row may be shorter than others.

    columns: their names, by default numbers.  place: (section, field, unit) of the data for a map layer × head; the
    script then says what a cell is, by its place.  tips: what each cell shows, of other maps.
    """
    count = max((len(row) for row in rows), default=0)
    names = list(columns) or [str(column) for column in range(count)]
    cell = min(_WIDE_CELL, _CELLS_WIDE / max(1, count))
    height = min(24.0 if len(rows) <= _MANY else 14.0, max(8.0, cell))
    left = 10 + _LETTER * max(len(label) for label in labels)
    top = max(0.0, 6 - height / 2)  # room for half a label above the first of narrow rows
    bottom, high = top + height * len(rows), max(high, 1e-12)
    width = left + max(cell * count, 150.0) + 2
    source = ""
    if place is not None:
        section, field, unit = map(escape, place)
        source = f' data-section="{section}" data-field="{field}" data-unit="{unit}" data-title="{escape(title)}"'
    size = f'viewBox="0 0 {width:.0f} {bottom + 36:.0f}" width="{width:.0f}"'
    look = "map" if cell >= _FINE else "map fine"
    parts = [f'<svg class="{look}" role="img" aria-label="{escape(title)}" {size}{source}>']
    every = max(1, math.ceil(_LINE / height))
    written = max((6.0 * len(short(value)) for row in rows for value in row), default=0.0) <= cell - 3
    for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
        y = top + index * height
        if index % every == 0:
            parts.append(
                f'<text class="tick end" x="{left - 6:.0f}" y="{y + height / 2 + 4:.1f}">{escape(label)}</text>'
            )
        cells = []
        for column, value in enumerate(row):
            x, share = left + column * cell, 0.0 if value is None else value / high
            fill = shade_signed(share) if signed else shade(share)
            what = f' data-tip="{escape(tips[index][column])}"' if tips else ""
            cells.append(f'<rect x="{x:g}" y="{y:g}" fill="{fill}"{what}/>')
            if written:
                light = ' class="light"' if abs(share) > 0.5 else ""
                cells.append(f'<text{light} x="{x + cell / 2:g}" y="{y + height / 2 + 4:g}">{short(value)}</text>')
        sides = f"--w:{cell - 1:g}px;--h:{height - 1:g}px"
        parts.append(f'<g data-row="{index}" style="{sides}">{"".join(cells)}</g>')
    longest = 6.5 * max((len(name) for name in names), default=1) + 4
    for column in range(0, count, max(1, math.ceil(longest / cell))):
        x = left + (column + 0.5) * cell
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{bottom + 13:.0f}">{escape(names[column])}</text>')
    parts.append(_scale_bar(left, bottom + 21, high, signed))
    return "".join(parts) + "</svg>"


def short(value: float | None) -> str:
    """A figure of two digits, to fit a cell."""
    if value is None:
        return "–"
    if abs(value) >= 9.95 or value == int(value):
        return f"{value:.0f}".replace("-", "−")
    text = f"{value:.1f}" if abs(value) >= 0.995 else f"{value:.2f}"
    if float(text) == 0:
        return "0"
    return text.replace("0.", ".", 1).replace("-", "−") if abs(value) < 0.995 else text.replace("-", "−")


def _scale_bar(x: float, y: float, high: float, signed: bool) -> str:
    """The colours in steps, with both ends named."""
    steps, width = 24, 80.0
    low = f"−{number(high)}" if signed else "0"
    begin = x + 6 + 6.5 * len(low)
    bars = []
    for step in range(steps):
        share = (step + 0.5) / steps
        fill = shade_signed(2 * share - 1) if signed else shade(share)
        place = f'x="{begin + step * width / steps:.2f}" y="{y:g}" width="{width / steps + 0.3:.2f}" height="8"'
        bars.append(f'<rect {place} fill="{fill}"/>')
    ends = f'<text x="{x:g}" y="{y + 8:g}">{low}</text>'
    ends += f'<text x="{begin + width + 5:.1f}" y="{y + 8:g}">{number(high)}</text>'
    return f'<g class="bar">{"".join(bars)}{ends}</g>'


@dataclass(frozen=True, kw_only=True)
class Line:
    """A curve. points: (x, y), in this order.  tips: what each mark shows, by default its values.  marks: whether
    any.  band: (low, high) of each point.  radius: of a mark, in pixels.  ring: the index of a mark that is larger.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: str = BLUE
    dashed: bool = False
    marks: bool = True
    tips: Sequence[str] = ()
    band: Sequence[tuple[float, float]] = ()
    radius: float = 3.5
    ring: int | None = None


def line_chart(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    x_names: Sequence[str] = (),
    x_ticks: Sequence[tuple[float, str]] = (),
    logarithmic: bool = False,
    log_y: bool = False,
    zero: bool = False,
    size: tuple[int, int] = (470, 250),
) -> str:
    """Curves over one axis. x_names: of x = 0, 1, 2 …, by default numbers.  x_ticks: places and names instead.

    logarithmic: the horizontal axis.  log_y: the vertical one, by powers of two.  zero: draw y = 0 as a line.
    """
    width, height = size
    left, top, bottom = 58.0, 12.0, height - 44.0
    named = [*x_names, *(name for _, name in x_ticks)]
    inset = 4 + 3.3 * max(map(len, named)) if named else 0.0  # room for half a name on either side
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + [y for line in lines for ends in line.band for y in ends]
    ys += [0.0] * zero
    to_x, to_y = (math.log if logarithmic else float), (math.log if log_y else float)
    x_low, x_high = to_x(min(xs)), to_x(max(xs))
    y_ticks = _powers(min(ys), max(ys)) if log_y else ticks(min(ys), max(ys))
    y_low, y_high = to_y(y_ticks[0]), to_y(y_ticks[-1])
    x_ticks = x_ticks or _x_ticks(min(xs), max(xs), x_names, logarithmic)
    last = 0 if named else max((len(name) for _, name in x_ticks[-1:]), default=0)
    right = width - max(14.0, 4 + 3.3 * last)  # room for half the name of a tick at the end

    def at(x: float, y: float) -> tuple[float, float]:
        across = (to_x(x) - x_low) / (x_high - x_low or 1)
        up = (to_y(y) - y_low) / (y_high - y_low or 1)
        return left + inset + across * (right - left - 2 * inset), bottom - up * (bottom - top)

    label = escape(f"{y_label}, by {x_label}: {', '.join(line.name for line in lines)}")
    frame = f'viewBox="0 0 {width} {height}" width="{width}"'
    parts = [f'<svg class="chart" role="img" aria-label="{label}" {frame}>']
    for tick in y_ticks:
        y = at(min(xs), tick)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{left - 6}" y="{y + 4:.1f}">{_axis(tick)}</text>')
    for value, name in x_ticks:
        x = at(value, y_ticks[0])[0]
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{bottom + 15:.0f}">{escape(name)}</text>')
    middle = (left + right) / 2
    parts.append(f'<text class="lab mid" x="{middle:.0f}" y="{height - 8}">{escape(x_label)}</text>')
    turned = f"translate(13,{(top + bottom) / 2:.0f}) rotate(-90)"
    parts.append(f'<text class="lab mid" transform="{turned}">{escape(y_label)}</text>')
    if zero:
        y = at(min(xs), 0.0)[1]
        parts.append(f'<line class="zero" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for line in lines:
        ends = [at(x, low) for (x, _), (low, _) in zip(line.points, line.band, strict=False)]
        ends += [at(x, high) for (x, _), (_, high) in zip(line.points, line.band, strict=False)][::-1]
        if ends:
            corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in ends)
            parts.append(f'<polygon fill="{line.colour}" opacity=".16" points="{corners}"/>')
    for line in lines:
        places = [at(x, y) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dashes = ' stroke-dasharray="5 4"' if line.dashed else ""
        parts.append(f'<polyline fill="none" stroke="{line.colour}" stroke-width="2"{dashes} points="{path}"/>')
        for index, ((x, y), (px, py)) in enumerate(zip(line.points, places, strict=True)) if line.marks else ():
            name = x_names[int(x)] if x_names else f"{x:,g}"
            tip = escape(line.tips[index] if line.tips else f"{line.name} {name}: {number(y, 4)}")
            look = f'r="{line.radius:g}" fill="{line.colour}"'
            if index == line.ring:
                look = f'r="{line.radius + 2:g}" fill="#fff" stroke="{line.colour}" stroke-width="2"'
            parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" {look} data-tip="{tip}"/>')
    return "".join(parts) + "</svg>"


def bar_chart(
    rows: Sequence[tuple[str, Sequence[tuple[str, float | None, str]]]], *, x_label: str, width: int = 470
) -> str:
    """Horizontal bars in groups, figures at their ends: (label, [(name, value, colour) …]); None has no bar."""
    values = [value for _, bars in rows for _, value, _ in bars if value is not None]
    marks = ticks(min(0.0, *values), max(0.0, *values)) if values else [0.0, 1.0]
    thick = 11.0
    gap = 7.0
    room = 6 + 5.5 * max((len(_rise(value)) for value in values), default=0)  # for the figure at a bar's end
    left = 10 + _LETTER * max(len(label) for label, _ in rows) + room * (marks[0] < 0)
    right = width - max(14.0, 2 + 3.4 * len(_axis(marks[-1])), room)  # half of the last mark's label
    group = thick * max(len(bars) for _, bars in rows) + gap
    bottom = group * len(rows)
    low, high = marks[0], marks[-1]

    def at(value: float) -> float:
        return left + (value - low) / (high - low or 1) * (right - left)

    frame = f'viewBox="0 0 {width} {bottom + 40:.0f}" width="{width}"'
    label_of_all = escape(f"{x_label}: {', '.join(label for label, _ in rows)}")
    parts = [f'<svg class="chart" role="img" aria-label="{label_of_all}" {frame}>']
    for mark in marks:
        x = at(mark)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom:.0f}"/>')
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{bottom + 14:.0f}">{_axis(mark)}</text>')
    for index, (label, bars) in enumerate(rows):
        y = index * group + gap / 2
        middle = y + thick * len(bars) / 2 + 4
        parts.append(
            f'<text class="tick end" x="{left - 6 - room * (low < 0):.0f}" y="{middle:.1f}">{escape(label)}</text>'
        )
        for number_of, (name, value, colour) in enumerate(bars):
            if value is not None:
                begin, end = sorted((at(0.0), at(value)))
                tip = escape(f"{label}, {name}: {_rise(value)} nats")
                parts.append(
                    f'<rect x="{begin:.1f}" y="{y + number_of * thick:.1f}" width="{max(1.0, end - begin):.1f}" '
                    f'height="{thick - 2}" fill="{colour}" data-tip="{tip}"/>'
                )
                x, side = (end + 4, "") if value >= 0 else (begin - 4, " end")
                base = y + number_of * thick + thick - 3
                parts.append(f'<text class="rise{side}" x="{x:.1f}" y="{base:.1f}">{_rise(value)}</text>')
    parts.append(f'<line class="zero" x1="{at(0):.1f}" x2="{at(0):.1f}" y1="0" y2="{bottom:.0f}"/>')
    parts.append(f'<text class="lab mid" x="{(left + right) / 2:.0f}" y="{bottom + 33:.0f}">{escape(x_label)}</text>')
    return "".join(parts) + "</svg>"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers, evenly spaced, that enclose low … high."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    step = 10 ** math.floor(math.log10((high - low) / count))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _powers(low: float, high: float, count: int = 6) -> list[float]:
    """Powers of two, evenly spaced on a logarithmic axis, that enclose low … high."""
    first, last = math.floor(math.log2(low) + 1e-9), math.ceil(math.log2(high) - 1e-9)
    step = max(1, math.ceil((last - first) / count))
    return [2.0 ** (first + step * index) for index in range(max(1, math.ceil((last - first) / step)) + 1)]


def _rise(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _axis(value: float) -> str:
    return f"{value:,g}".replace("-", "−")


def _x_ticks(low: float, high: float, names: Sequence[str], logarithmic: bool) -> list[tuple[float, str]]:
    if names:
        every = max(1, math.ceil(len(names) * max(len(name) for name in names) * 6.5 / 400))
        return [(float(index), name) for index, name in enumerate(names) if index % every == 0]
    if logarithmic:
        powers = [2.0**power for power in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
        return [(power, _axis(power)) for power in powers[:: max(1, math.ceil(len(powers) / 9))]]
    return [(tick, _axis(tick)) for tick in ticks(low, high) if low <= tick <= high]
