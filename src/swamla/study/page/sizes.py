"""What becomes of the differences as models grow: of a study of several sizes, a figure and a table of all of them."""

import math
from collections.abc import Callable, Sequence
from html import escape

from swamla.interpret.page.parts import legend
from swamla.interpret.page.svg import ticks
from swamla.study.page.parts import Section, colour_of, favours, name_of, signed, table, verdict_word
from swamla.study.results import Results
from swamla.study.statistics import Comparison
from swamla.study.trends import Trend

LOOKS = {"fades": "partly", "grows": "partly", "changes": "partly", "stays": "figure", "undecided": "no"}
_WIDEST = 6.0  # an interval is drawn up to so many times what the means and the margin span
_APART = 11.0  # pixels between the marks of arms at one size
_WIDTH, _HEIGHT, _LEFT, _TOP = 700.0, 300.0, 74.0, 12.0


def by_size(results: Results) -> Section | None:
    """Differences over parameters, with intervals."""
    if not results.sizes:
        return None
    study = results.study
    better = "down" if study.axis.direction == "lower" else "up"
    told = (
        f"Differences from {escape(next(iter(results.sizes.values())).study.reference)} at each size, means over seeds "
        "with 95 % intervals of the single difference; arms stand beside each other at a size. Grey: the margin of "
        f"±{study.axis.margin:g}. An arrow: the interval goes on. The horizontal axis is logarithmic."
    )
    first, last = study.sizes[0], study.sizes[-1]
    lead = (
        f"Every size was {study.each_size} by itself. Whether a difference lasts is the change "
        f"from width {first} to {last}, paired by seed: a seed has the same rows at all sizes. It fades "
        "or grows, turns to the other side, stays within the margin, or is undecided; p of the differences is adjusted "
        "for all sizes together, p of the changes for all arms (Holm)."
    )
    label = f"difference in {study.axis.name} ({better} is better)"
    drawn = size_chart(_points(results), margin=study.axis.margin, y_label=label)
    figure = f"<figure>{drawn}<figcaption>{told}</figcaption></figure>"
    smallest = next(iter(results.sizes.values()))
    arms = legend([(one.arm, colour_of(smallest, one.arm)) for one in smallest.comparisons])
    return "By size", lead, arms + figure + _table(results)


def trend_word(trend: Trend) -> tuple[str, str]:
    """The trend in a word, and its look: of a turn, whether it is for the arm or against it."""
    turned = "better" if favours(trend.change) else "worse"
    return trend.kind, LOOKS.get(trend.kind, turned)


Point = tuple[str, str, str, Comparison]  # arm, colour, parameters in words, the comparison


def _points(results: Results) -> list[tuple[int, list[Point]]]:
    """Parameters of the first arm at each size, and the other arms there."""
    found = []
    for size, at in results.sizes.items():
        points = [
            (
                one.arm,
                colour_of(at, one.arm),
                f"width {size}, {at.study.arm(one.arm).costs.parameters:,} parameters",
                one,
            )
            for one in at.comparisons
        ]
        found.append((at.study.arms[0].costs.parameters, points))
    return found


def size_chart(sizes: Sequence[tuple[int, Sequence[Point]]], *, margin: float, y_label: str) -> str:
    """Differences over parameters. sizes: (parameters, the arms there), the smallest first."""
    right, bottom = _WIDTH - 18, _HEIGHT - 46
    there = [one.interval for _, points in sizes for *_, one in points if one.seeds]
    near = max([1.5 * margin, *(abs(float(interval.mean)) for interval in there)])
    ends = [abs(float(end)) for interval in there for end in interval[1:] if math.isfinite(end)]
    most = min(_WIDEST * near, max([near, *ends]))
    lowest = min([-margin, *(float(end) for interval in there for end in interval[:2])])
    highest = max([margin, *(float(end) for interval in there for end in (interval.mean, interval.high))])
    marks = ticks(max(-most, lowest), min(most, highest), 6)
    low, high = marks[0], marks[-1]
    logs = [math.log(parameters) for parameters, _ in sizes]
    inset = 90.0

    def across(parameters: int) -> float:
        share = (math.log(parameters) - logs[0]) / (logs[-1] - logs[0] or 1)
        return _LEFT + inset + share * (right - _LEFT - 2 * inset)

    def up(value: float) -> float:
        return bottom - (min(high, max(low, value)) - low) / (high - low) * (bottom - _TOP)

    parts = [
        f'<svg class="chart sizes" role="img" aria-label="differences by size" viewBox="0 0 {_WIDTH:.0f} '
        f'{_HEIGHT:.0f}" width="{_WIDTH:.0f}">',
        f'<rect class="margin" x="{_LEFT}" width="{right - _LEFT}" y="{up(margin):.1f}" '
        f'height="{up(-margin) - up(margin):.1f}" fill="#000" opacity=".07" data-tip="margin: ±{margin:g}"/>',
    ]
    for mark in marks:
        name = f"{mark:+g}".replace("-", "−") if mark else "0"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{up(mark):.1f}" y2="{up(mark):.1f}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 6}" y="{up(mark) + 4:.1f}">{name}</text>')
    for parameters, _ in sizes:
        x = across(parameters)
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{bottom + 15:.0f}">{parameters:,}</text>')
    parts.append(f'<line class="zero" x1="{_LEFT}" x2="{right}" y1="{up(0):.1f}" y2="{up(0):.1f}"/>')
    count = max(len(points) for _, points in sizes)
    for index in range(count):
        aside = (index - (count - 1) / 2) * _APART
        own = [(across(parameters) + aside, points[index]) for parameters, points in sizes]
        parts += _line_of(own, (low, high), up)
    middle = f"translate(13,{(_TOP + bottom) / 2:.0f}) rotate(-90)"
    parts.append(f'<text class="lab mid" transform="{middle}">{escape(y_label)}</text>')
    parts.append(
        f'<text class="lab mid" x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 10:.0f}">parameters without embeddings'
        "</text>"
    )
    return "".join(parts) + "</svg>"


def _line_of(own: Sequence[tuple[float, Point]], ends: tuple[float, float], up: Callable[[float], float]) -> list[str]:
    """An arm's means joined, each with its interval."""
    known = [(x, point) for x, point in own if point[3].seeds]
    parts, slack = [], 1e-6 * (ends[1] - ends[0])  # a tick that is the end of an interval, but for rounding
    if known:
        path = " ".join(f"{x:.1f},{up(float(one.interval.mean)):.1f}" for x, (*_, one) in known)
        parts.append(
            f'<polyline fill="none" stroke="{known[0][1][1]}" stroke-width="1.5" stroke-dasharray="4 4" '
            f'points="{path}"/>'
        )
    for x, (name, colour, what, one) in known:
        mean, low, high = (float(value) for value in one.interval)
        sure = f"95 % interval {low:+.4f} to {high:+.4f}, {len(one.seeds)} seeds" if math.isfinite(low) else "one seed"
        tip = escape(f"{name}, {what}: {mean:+.4f}, {sure}")
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{up(low):.1f}" y2="{up(high):.1f}" stroke="{colour}" '
            f'stroke-width="2" data-tip="{tip}"/>'
        )
        for end, side in ((low, 1), (high, -1)):
            y = up(end)
            if -slack <= end - ends[0] <= ends[1] - ends[0] + slack:
                parts.append(f'<line x1="{x - 5:.1f}" x2="{x + 5:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}"/>')
            else:
                corners = f"{x:.1f},{y:.1f} {x - 6:.1f},{y - 10 * side:.1f} {x + 6:.1f},{y - 10 * side:.1f}"
                parts.append(f'<polygon class="arrow" fill="{colour}" points="{corners}"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{up(mean):.1f}" r="4.5" fill="{colour}" data-tip="{tip}"/>')
    return parts


def _table(results: Results) -> str:
    """A row for each arm: its difference at each size, and the change."""
    sizes = results.sizes
    smallest = next(iter(sizes.values()))
    names = [arm.name for arm in smallest.study.arms]
    rows = []
    for trend in results.trends:
        row = [name_of(smallest, names.index(trend.arm))]
        for at in sizes.values():
            (one,) = (one for one in at.comparisons if one.arm == trend.arm)
            row.append(f"{_with_interval(one)}<small>{verdict_word(one)[0]}</small>")
        row.append(f"{_with_interval(trend.change)}<small>{trend_word(trend)[0]}</small>")
        rows.append(row)
    head = ["arm", *(f"width {size}|{at.study.arms[0].costs.parameters:,} parameters" for size, at in sizes.items())]
    head.append(f"change|width {results.study.sizes[0]} to {results.study.sizes[-1]}")
    meaning = (
        f"Differences from {smallest.study.reference} in {results.study.axis.name}, and their change, with 95 % "
        "intervals, each of one comparison alone, and the verdicts, adjusted for all."
    )
    return table(head, rows, meaning, "stacked")


def _with_interval(one: Comparison) -> str:
    if not one.seeds:
        return "none"
    mean, low, high = (float(value) for value in one.interval)
    between = f"{signed(low)} to {signed(high)}" if math.isfinite(low) else "one seed"
    return f"<b>{signed(mean)}</b><small>{between}</small>"
