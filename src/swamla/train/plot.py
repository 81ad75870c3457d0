"""Plots: loss.png of one run, and curves of several runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swamla.train.tracking.metrics import read_metrics


def plot_losses(metrics_file: Path, picture: Path, *, title: str) -> None:
    """Draw training loss (raw faint, smoothed bold) and held-out loss over steps.

    In bits per byte, each by the bytes of its own text; in nats per token where an evaluation does not give them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(metrics_file)
    steps_taken = [record for record in records if record.get("loss") is not None]
    evaluations = [record for record in records if record.get("held_out_loss") is not None]
    in_bits = all(record.get("bits_per_byte") is not None for record in steps_taken)
    in_bits = in_bits and all(record.get("held_out_bits_per_byte") is not None for record in evaluations)
    key, label = ("bits_per_byte", "bits per byte") if in_bits else ("loss", "loss (nats per token)")
    training = [(record["step"], record[key]) for record in steps_taken]
    held_out = [(record["step"], record[f"held_out_{key}"]) for record in evaluations]
    if not training:
        return
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = zip(*training, strict=True)
    axes.plot(steps, losses, color="#4c72b0", alpha=0.22, linewidth=0.8)
    axes.plot(steps, smooth(losses), color="#4c72b0", linewidth=1.8, label="training (smoothed)")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="#dd8452", markersize=4, linewidth=1.2, label="held out")
    axes.set(title=title, xlabel="step", ylabel=label)
    axes.grid(alpha=0.25)
    axes.spines[["top"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(picture)


X_AXES = {"step": "step", "tokens": "tokens", "time": "minutes"}
_HELD_OUT = "held_out_"
_UNITS = {"loss": " (nats per token)", "held_out_loss": " (nats per token)", "peak_memory": " (bytes)"}
# Eight colours that colour-blind people can tell apart too (Okabe and Ito), the palest last.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00", "#8C8C8C")
_LINES = ("-", "--", ":", "-.")
_START = 0.02  # first part of a run that the y-axis need not cover, because its losses are high


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A run's curves of one quantity: (x, y) of each training record, and of each evaluation."""

    name: str
    training: list[tuple[float, float]]
    held_out: list[tuple[float, float]]


def read_curve(name: str, records: Sequence[Mapping[str, Any]], *, x: str, y: str) -> Curve:
    """The curves of `y` over `x` (a key of `X_AXES`) in a run's records: on training text, and on held-out text."""
    training_key, held_out_key = ("", y) if y.startswith(_HELD_OUT) else (y, _HELD_OUT + y)
    training: list[tuple[float, float]] = []
    held_out: list[tuple[float, float]] = []
    tokens = 0
    for record in records:
        tokens = record.get("tokens", tokens)
        place = {"step": record["step"], "tokens": tokens, "time": record.get("elapsed", 0.0) / 60}[x]
        for key, points in ((training_key, training), (held_out_key, held_out)):
            if isinstance(record.get(key), int | float):
                points.append((place, record[key]))
    return Curve(name=name, training=training, held_out=held_out)


def plot_runs(curves: Sequence[Curve], picture: Path, *, x: str, y: str) -> None:
    """Draw each run in its own colour: training records faint, smoothed bold; evaluations as markers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    seen: list[float] = []
    for index, curve in enumerate(curves):
        colour, line = _COLOURS[index % len(_COLOURS)], _LINES[index // len(_COLOURS) % len(_LINES)]
        label: str | None = curve.name
        if curve.training:
            places, values = zip(*curve.training, strict=True)
            smoothed = smooth(values)
            axes.plot(places, values, color=colour, alpha=0.15, linewidth=0.6)
            axes.plot(places, smoothed, color=colour, linestyle=line, linewidth=1.6, label=label)
            seen += smoothed[int(_START * len(smoothed)) :]
            label = None
        if curve.held_out:
            style = "o" if curve.training else f"o{line}"
            axes.plot(
                *zip(*curve.held_out, strict=True),
                style,
                color=colour,
                markersize=5,
                markeredgecolor="white",
                markeredgewidth=0.7,
                label=label,
            )
            seen += [value for _, value in curve.held_out]
    margin = 0.05 * (max(seen) - min(seen)) or 0.05 * abs(max(seen)) or 1.0
    axes.set_ylim(min(seen) - margin, max(seen) + margin)
    axes.set(xlabel=X_AXES[x], ylabel=y.replace("_", " ") + _UNITS.get(y, ""), title=_title(curves, y))
    if x != "time":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(picture)


def _title(curves: Sequence[Curve], y: str) -> str:
    held_out = any(curve.held_out for curve in curves) and not y.startswith(_HELD_OUT)
    trained = any(curve.training for curve in curves)
    return y.replace("_", " ") + (", training (lines) and held out (marks)" if held_out and trained else "")


def smooth(values: Sequence[float]) -> list[float]:
    """Centred moving average. On either side it reaches over a tenth of the way so far, at most 3 % of all values.

    Centred, so that a falling curve does not lag; narrow at first, where the curve falls fast.
    """
    total = np.concatenate([[0.0], np.cumsum(values)])
    index, count = np.arange(len(values)), len(values)
    reach = np.minimum(index // 10, count * 3 // 100)
    first, end = index - reach, np.minimum(index + reach + 1, count)
    return ((total[end] - total[first]) / (end - first)).tolist()
