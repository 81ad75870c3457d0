"""The study's figures as PNG, for papers: the same data and colours as the page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swamla.interpret.page.figures import draw_map, finish, new_figure
from swamla.study.nanogpt_mla.page import COLOURS, MAPS
from swamla.study.nanogpt_mla.plan import MIXERS

Data = Mapping[str, Any]


def write_figures(data: Data, folder: Path) -> list[str]:
    """Write curves.png and, of every experiment, maps-NAME.png; returns their names."""
    _curves(data, folder / "curves.png")
    names = ["curves.png"]
    for experiment in data["experiments"]:
        rows = [row for row in data["runs"] if row["experiment"] == experiment["slug"]]
        first = min((row["seed"] for row in rows), default=0)
        if shown := [row for row in rows if row["seed"] == first]:
            names.append(f"maps-{experiment['slug']}.png")
            _maps(shown, folder / names[-1])
    return names


def _curves(data: Data, file: Path) -> None:
    figure = new_figure(4.0 * len(data["experiments"]), 3.0)
    (line,) = figure.subplots(1, len(data["experiments"]), squeeze=False)
    for axes, experiment in zip(line, data["experiments"], strict=True):
        for row in data["runs"]:
            if row["experiment"] == experiment["slug"]:
                axes.plot(row["curve"]["steps"], row["curve"]["score"], color=COLOURS[row["mixer"]], linewidth=1.2)
        for mixer in MIXERS:
            axes.plot([], [], color=COLOURS[mixer], label=mixer)
        axes.set_title(f"{experiment['title']}, rate {experiment['lr']:g}", fontsize=9)
        axes.legend(frameon=False, fontsize=8)
        finish(axes, "step", "held-out accuracy" if experiment["kind"] == "repeats" else "held-out nats a token")
    figure.savefig(file)


def _maps(rows: list[Data], file: Path) -> None:
    """A row a mixer, a column a measure."""
    depth = max(len(row["repeats"]["layers"]) for row in rows)
    figure = new_figure(2.6 * len(MAPS), len(rows) * (0.9 + 0.26 * depth) + 0.4)
    grid = figure.subplots(len(rows), len(MAPS), squeeze=False)
    for row, line in zip(rows, grid, strict=True):
        for axes, (field, title, _, signed) in zip(line, MAPS, strict=True):
            layers = [layer[field] for layer in row["repeats"]["layers"]]
            labels = [f"layer {index}" for index in range(len(layers))]
            draw_map(figure, axes, layers, labels, signed=signed, high=1.0)
            axes.set_title(f"{row['mixer']}: {title}", fontsize=8)
    figure.savefig(file)
