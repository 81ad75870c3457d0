"""The figure of a study: each arm's difference from the first one, its interval, the margin, and every seed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from swamla.interpret.page.svg import ticks

_ROW, _TOP, _LETTER = 44.0, 12.0, 7.4
_WIDEST = 4.0  # an interval is drawn up to so many times what the seeds and the margin span


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A row: the mean with its interval, infinite for a single seed; (value, what the pointer shows) of each seed.

    inner: the narrower interval by which equivalence is judged.
    """

    name: str
    colour: str
    mean: float
    low: float
    high: float
    inner: tuple[float, float]
    seeds: Sequence[tuple[float, str]]


def interval_chart(rows: Sequence[Difference], *, margin: float, x_label: str, width: int = 760) -> str:
    """Differences over one axis, with the margin as a band about 0. An arrow: the interval goes on."""
    left = 20 + _LETTER * max((len(row.name) for row in rows), default=0)
    bottom = _TOP + _ROW * len(rows)
    near = max([1.25 * margin, *(abs(value) for row in rows for value, _ in row.seeds)])
    ends = [end for row in rows for end in (row.low, row.high) if math.isfinite(end)]
    farthest = min(_WIDEST * near, max([near, *map(abs, ends)]))
    marks = ticks(-farthest, farthest, 8)
    low, high = marks[0], marks[-1]
    right = width - max(18.0, 1 + 3.4 * len(f"{high:+g}"))  # room for half of the last mark's name

    def at(value: float) -> float:
        return left + (min(high, max(low, value)) - low) / (high - low) * (right - left)

    parts = [
        f'<svg class="chart intervals" role="img" aria-label="differences from the first arm" '
        f'viewBox="0 0 {width} {bottom + 42:.0f}" width="{width}">',
        f'<rect class="margin" x="{at(-margin):.1f}" width="{at(margin) - at(-margin):.1f}" y="{_TOP}" '
        f'height="{bottom - _TOP:.0f}" fill="#000" opacity=".07" data-tip="margin: ±{margin:g}"/>',
    ]
    for mark in marks:
        name = f"{mark:+g}".replace("-", "−") if mark else "0"
        parts.append(f'<line class="grid" x1="{at(mark):.1f}" x2="{at(mark):.1f}" y1="{_TOP}" y2="{bottom:.0f}"/>')
        parts.append(f'<text class="tick mid" x="{at(mark):.1f}" y="{bottom + 15:.0f}">{name}</text>')
    parts.append(f'<line class="zero" x1="{at(0):.1f}" x2="{at(0):.1f}" y1="{_TOP}" y2="{bottom:.0f}"/>')
    for index, row in enumerate(rows):
        parts += _row(row, _TOP + _ROW * (index + 0.5), left, (low, high), at)
    parts.append(f'<text class="lab mid" x="{(left + right) / 2:.0f}" y="{bottom + 35:.0f}">{escape(x_label)}</text>')
    return "".join(parts) + "</svg>"


def _row(row: Difference, y: float, left: float, ends: tuple[float, float], at: Callable[[float], float]) -> list[str]:
    parts = [f'<text class="lab end" x="{left - 10:.0f}" y="{y + 4:.1f}">{escape(row.name)}</text>']
    if not row.seeds:
        parts.append(f'<text class="tick" x="{at(0) + 8:.1f}" y="{y + 4:.1f}">no seed in common</text>')
        return parts
    sure = f"95 % interval {row.low:+.4f} to {row.high:+.4f}" if math.isfinite(row.low) else "one seed"
    told = f"{row.name}: mean {row.mean:+.4f}, {sure}"
    x1, x2 = at(row.low), at(row.high)
    parts.append(
        f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y}" y2="{y}" stroke="{row.colour}" stroke-width="2" '
        f'data-tip="{escape(told)}"/>'
    )
    inner = " ".join(f'x{end}="{at(value):.1f}"' for end, value in enumerate(row.inner, 1))
    parts.append(f'<line {inner} y1="{y}" y2="{y}" stroke="{row.colour}" stroke-width="6"/>')
    for end, x, side in ((row.low, x1, -1), (row.high, x2, 1)):
        if ends[0] <= end <= ends[1]:
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 6}" y2="{y + 6}" stroke="{row.colour}"/>')
        else:
            corners = f"{x + 8 * side:.1f},{y} {x - 2 * side:.1f},{y - 7} {x - 2 * side:.1f},{y + 7}"
            parts.append(f'<polygon class="arrow" fill="{row.colour}" points="{corners}"/>')
    for value, tip in row.seeds:
        parts.append(
            f'<circle cx="{at(value):.1f}" cy="{y}" r="4.5" fill="#fff" stroke="{row.colour}" stroke-width="2" '
            f'data-tip="{escape(tip)}"/>'
        )
    parts.append(
        f'<rect class="mean" x="{at(row.mean) - 1.5:.1f}" y="{y - 13}" width="3" height="26" fill="{row.colour}" '
        f'data-tip="{escape(told)}"/>'
    )
    return parts
