"""The figures of a report as PNG, for papers: the same data and colours as the page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from swamla.interpret.page.svg import BLUE, GREY, ORANGE, shade, shade_signed, short

Data = Mapping[str, Any]
SIGNED = LinearSegmentedColormap.from_list("signed", [shade_signed(-1), "#ffffff", shade_signed(1)])
PLAIN = LinearSegmentedColormap.from_list("plain", ["#ffffff", shade(1)])
FIGURES = tuple(f"{name}.png" for name in ("induction", "attention", "lens", "worth", "patterns", "context", "experts"))
_LARGEST = 40.0  # inches: of a figure of many layers or heads


def write_figures(data: Data, folder: Path) -> None:
    """Write induction.png, attention.png and, of what was measured on text, worth, patterns, lens, context, experts.

    Pictures of an earlier report are removed.
    """
    for name in FIGURES:
        (folder / name).unlink(missing_ok=True)
    _maps(data, folder / "induction.png", "repeats", _INDUCTION)
    _attention(data, folder / "attention.png")
    if data["lens"] is not None:
        _lens(data, folder / "lens.png")
    if data["worth"] is not None:
        _worth(data, folder / "worth.png")
    if data["patterns"] is not None:
        _maps(data, folder / "patterns.png", "patterns", _PATTERNS)
    if data["positions"] is not None:
        _context(data, folder / "context.png")
    if data["routing"] is not None:
        _experts(data, folder / "experts.png")


# (field, title, whether signed, the scale's end or 0 for the largest)
_INDUCTION = (
    ("hit", "hit rate", False, 1.0),
    ("attribution", "attribution", True, 1.0),
    ("induction", "induction, share of |weight|", False, 1.0),
    ("previous", "previous token, share", False, 1.0),
)
_PATTERNS = (
    ("previous", "previous token, share", False, 1.0),
    ("sink", "first token (sink), share", False, 1.0),
    ("entropy", "entropy, 0 … 1", False, 1.0),
    ("effective_context", "effective context, tokens", False, 0.0),
)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    figure = Figure(figsize=(min(width, _LARGEST), min(height, _LARGEST)), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _labels(data: Data) -> list[str]:
    return [f"{index} {layer['mixer']}" for index, layer in enumerate(data["layers"])]


def _maps(data: Data, file: Path, section: str, maps: Sequence[tuple[str, str, bool, float]]) -> None:
    layers = data[section]["layers"]
    heads = max(layer["heads"] for layer in data["layers"])
    figure = new_figure(len(maps) * max(2.1, 0.9 + 0.24 * heads), 1.2 + max(1.0, 0.24 * len(layers)))
    for axes, (field, title, signed, high) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps, strict=True):
        draw_map(figure, axes, [layer[field] for layer in layers], _labels(data), signed=signed, high=high)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("head", fontsize=8)
    figure.savefig(file)


def draw_map(
    figure: Figure, axes: Any, rows: Sequence[Sequence[float]], labels: Sequence[str], *, signed: bool, high: float
) -> None:
    """Rows of different lengths on one scale, figures in the cells where there is room."""
    columns = max(map(len, rows))
    table = np.full((len(rows), columns), np.nan)
    for index, row in enumerate(rows):
        table[index, : len(row)] = [np.nan if value is None else value for value in row]
    high = high or float(np.nanmax(np.abs(table))) or 1.0
    colours, low = (SIGNED, -high) if signed else (PLAIN, 0.0)
    picture = axes.imshow(table, cmap=colours, vmin=low, vmax=high, aspect="auto")
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.set_xticks(range(0, columns, max(1, columns // 8)))
    axes.tick_params(labelsize=7, length=2)
    if columns <= 8:
        for (index, column), value in np.ndenumerate(table):
            if np.isfinite(value):
                colour = "white" if abs(value) > high / 2 else "#333333"
                axes.text(column, index, short(value), ha="center", va="center", fontsize=6, color=colour)
    figure.colorbar(picture, ax=axes, shrink=0.8).ax.tick_params(labelsize=6)


def _attention(data: Data, file: Path) -> None:
    """Every head's weights on the first text, a row a layer; colours as the page's, by the layer's largest |weight|."""
    text = data["texts"][0]
    heads = max(layer["heads"] for layer in data["layers"])
    side = 1.3 if heads <= 8 else 0.8
    figure = new_figure(0.6 + side * heads, 0.4 + side * len(text["layers"]))
    grid = figure.subplots(len(text["layers"]), heads, squeeze=False)
    count = len(text["tokens"])
    for index, (layer, label) in enumerate(zip(text["layers"], _labels(data), strict=True)):
        for head, axes in enumerate(grid[index]):
            axes.set_xticks([])
            axes.set_yticks([])
            if head >= len(layer["heads"]):
                axes.axis("off")
                continue
            drawn = layer["heads"][head]
            weight_TS = np.zeros((count, count))
            for query, row in enumerate(drawn["weights"]):
                weight_TS[query, : len(row)] = np.array(row) * drawn["unit"]
            depth_TS = np.sign(weight_TS) * np.sqrt(np.abs(weight_TS) / (layer["largest"] or 1.0))
            axes.imshow(depth_TS, cmap=SIGNED, vmin=-1, vmax=1, interpolation="nearest")
            axes.spines[:].set_color("#bbbbbb")
            if index == 0:
                axes.set_title(f"head {head}", fontsize=7)
            if head == 0:
                axes.set_ylabel(label, fontsize=7)
    figure.savefig(file)


def _worth(data: Data, file: Path) -> None:
    layers, labels = data["worth"]["layers"], _labels(data)
    heads = max(layer["heads"] for layer in data["layers"])
    figure = new_figure(5.0 + max(2.0, 0.24 * heads), 1.3 + max(1.2, 0.26 * len(layers)))
    left, right = figure.subplots(1, 2, width_ratios=(4.0, max(2.0, 0.24 * heads)))
    place = np.arange(len(layers))
    for offset, part, name, colour in ((-0.2, "mixer", "mixer", BLUE), (0.2, "ffn", "FFN", ORANGE)):
        left.barh(place + offset, [layer[part] for layer in layers], 0.38, color=colour, label=name)
    left.set_yticks(place, labels, fontsize=7)
    left.invert_yaxis()
    left.axvline(0, color="#444444", linewidth=0.8)
    left.set_xlabel("rise of the loss when left out, nats a token", fontsize=8)
    left.tick_params(labelsize=7)
    left.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    rises = [layer["heads"] for layer in layers]
    draw_map(figure, right, rises, labels, signed=min(map(min, rises)) < -0.005, high=0.0)
    right.set_title("one head left out, nats", fontsize=9)
    right.set_xlabel("head", fontsize=8)
    figure.savefig(file)


def _lens(data: Data, file: Path) -> None:
    figure = new_figure(5.5, 3.0)
    axes = figure.subplots()
    losses = data["lens"]["loss"]
    axes.plot(range(len(losses)), losses, "o-", color=BLUE, markersize=4)
    names = ["embedding", *_labels(data)]
    every = max(1, len(names) // 10)
    axes.set_xticks(range(0, len(names), every), names[::every], fontsize=7)
    finish(axes, "stream behind", "loss, nats a token")
    figure.savefig(file)


def _context(data: Data, file: Path) -> None:
    positions, needed = data["positions"], data["needed"]
    figure = new_figure(8.0 if needed else 4.2, 3.0)
    axes = figure.subplots(1, 2 if needed else 1, squeeze=False)[0]
    middle = [(first * last) ** 0.5 for first, last in zip(positions["first"], positions["last"], strict=True)]
    axes[0].plot(middle, positions["loss"], "o-", color=BLUE, markersize=4)
    finish(axes[0], "position in the document, tokens", "loss, nats a token", logarithmic=True)
    if needed:
        found = needed["found"]
        tokens, losses = zip(*((int(each), loss) for each, loss in found["losses"].items()), strict=True)
        axes[1].plot(tokens, losses, "o-", color=BLUE, markersize=4)
        axes[1].axhline(found["loss"], color=GREY, linestyle="--", linewidth=1)
        finish(axes[1], "last tokens that are read", "loss, nats a token", logarithmic=True)
    figure.savefig(file)


def _experts(data: Data, file: Path) -> None:
    layers = data["routing"]["layers"]
    known = [index for index, tokens in enumerate(layers[0]["tokens"]) if tokens]
    labels = [data["routing"]["classes"][index] for index in known]
    experts = len(layers[0]["share"][0])
    figure = new_figure(1.6 + max(2.5, 0.22 * experts), 0.6 + len(layers) * max(1.2, 0.24 * len(known)))
    high = max(share for layer in layers for row in layer["share"] for share in row)
    for axes, layer in zip(figure.subplots(len(layers), 1, squeeze=False)[:, 0], layers, strict=True):
        draw_map(figure, axes, [layer["share"][index] for index in known], labels, signed=False, high=high)
        axes.set_title(f"layer {layer['layer']}: share of a class's choices by expert", fontsize=8)
    figure.savefig(file)


def finish(axes: Any, x_label: str, y_label: str, *, logarithmic: bool = False) -> None:
    """Label the axes of curves."""
    if logarithmic:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(x_label, fontsize=8)
    axes.set_ylabel(y_label, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
