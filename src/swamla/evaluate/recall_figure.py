"""The picture of recall: accuracy over bytes of state and, of one model, a heat map over two sizes of the task."""

from collections.abc import Mapping, Sequence
from typing import Any

from swamla.evaluate.recall_grid import Recall

# Distinguishable with any colour vision (Okabe and Ito), the palest last; a marker for each cell of the grid.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00", "#8C8C8C")
_MARKERS = "os^Dv*PXph"
_HOLLOW = {"markersize": 8.0, "markerfacecolor": "none", "markeredgewidth": 1.5}  # points at 1 lie on each other


def draw_recall(found: Mapping[str, Sequence[Recall]], swept: Sequence[str], *, title: str) -> Any:
    """A figure of matplotlib: each run's accuracies, with their intervals, over the bytes of state, by the runs' names.

    swept: the sizes of the task that differ. One run and two of them give a heat map, too, "length" across.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    has_map = len(found) == 1 and len(swept) == 2
    figure = Figure(figsize=(12 if has_map else 7.5, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    places = figure.subplots(1, 2 if has_map else 1, squeeze=False)[0]
    _draw_points(places[0], found, swept)
    if has_map:
        _draw_map(places[1], next(iter(found.values())), swept)
    return figure


def _draw_points(axes: Any, found: Mapping[str, Sequence[Recall]], swept: Sequence[str]) -> None:
    cells = list(dict.fromkeys(_cell(one, swept) for cells in found.values() for one in cells))
    markers = dict(zip(cells, _MARKERS if len(cells) <= len(_MARKERS) else "o" * len(cells), strict=False))
    for run, (name, recalls) in enumerate(found.items()):
        colour = _COLOURS[run % len(_COLOURS)]
        for one in recalls:
            low, high = one.score.interval
            share, marker = one.score.accuracy, markers[_cell(one, swept)]
            reach = [[max(0.0, share - low)], [max(0.0, high - share)]]
            axes.errorbar(one.state_bytes, share, reach, color=colour, marker=marker, capsize=2, **_HOLLOW)
        axes.plot([], [], "-", linewidth=4, color=colour, label=_drawable(name))
    if 1 < len(cells) <= len(_MARKERS):
        for cell, marker in markers.items():
            label = ", ".join(f"{size} {value}" for size, value in zip(swept, cell, strict=True))
            axes.plot([], [], marker, color="#606060", label=label, **_HOLLOW)
    axes.set(xlabel="bytes of state of one row (fp32)", ylabel="accuracy, with 95 % intervals", ylim=(-0.03, 1.03))
    axes.set_xscale("log", base=2)
    sizes = [one.state_bytes for cells in found.values() for one in cells]
    axes.set_xlim(min(sizes) / 1.5, max(sizes) * 1.5)
    axes.xaxis.set_major_formatter(_of_bytes)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_map(axes: Any, recalls: Sequence[Recall], swept: Sequence[str]) -> None:
    across, up = sorted(swept, key=lambda name: name != "length")
    shares = {_cell(one, (across, up)): one.score.accuracy for one in recalls}
    columns, rows = (list(dict.fromkeys(sorted(cell[side] for cell in shares))) for side in (0, 1))
    grid = [[shares.get((column, row), float("nan")) for column in columns] for row in rows]
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", origin="lower", aspect="auto")
    for y, line in enumerate(grid):
        for x, share in enumerate(line):
            text, colour = ("–", "#606060") if share != share else (f"{share:.2f}", "white" if share < 0.6 else "black")
            axes.text(x, y, text, ha="center", va="center", color=colour)
    axes.set(xlabel=across, ylabel=up)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.figure.colorbar(image, ax=axes, label="accuracy")


def _cell(one: Recall, swept: Sequence[str]) -> tuple[Any, ...]:
    """The values of the swept sizes."""
    return tuple(getattr(one.task, name) for name in swept)


def _of_bytes(count: float, _: int) -> str:
    """Powers of two as people write them: 512 B, 16 KiB."""
    for size, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= size:
            return f"{count / size:g} {unit}"
    return f"{count:g} B"


def _drawable(name: str) -> str:
    """A folder's name as text to draw: surrogates, as in the locale C, cannot be drawn; a leading _ hides a label."""
    return " " * name.startswith("_") + name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
