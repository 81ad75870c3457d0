"""Plots: loss.png of one run, and curves of several runs."""

import math
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
    from matplotlib.ticker import MaxNLocator

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
    axes.plot(steps, smooth(losses), _dots(steps), color="#4c72b0", linewidth=1.8, label="training (smoothed)")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="#dd8452", markersize=4, linewidth=1.2, label="held out")
    axes.set(title=as_text(title), xlabel="step", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(picture)


def as_text(name: str) -> str:
    """A file's name as text to draw: surrogates, as in the locale C, cannot be drawn."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


X_AXES = {
    "step": "step",
    "tokens": "tokens trained on",
    "flops": "training FLOPs (each row taken as one document)",
    "time": "minutes of training, evaluations included",
}
IN_NATS = ("loss", "held_out_loss", "perplexity", "held_out_perplexity")  # per token, so of one tokenizer only
_HELD_OUT = "held_out_"
_UNITS = {"loss": " (nats per token)", "held_out_loss": " (nats per token)", "peak_memory": " (bytes)"}
# Eight colours that colour-blind people can tell apart too (Okabe and Ito), the palest last.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00", "#8C8C8C")
_LINES = ("-", "--", ":", "-.")
_GREY = "#606060"
_START = 0.02  # first part of a run that the y-axis need not cover, because its losses are high
_FEW = 3  # points of a curve up to which each has a marker, because a line would hardly be seen
_MARK = {"markersize": 5.0, "markeredgecolor": "white", "markeredgewidth": 0.7}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A run's curves of one quantity: (x, y) of each training record, and of each evaluation.

    lost: x of the records whose value was not finite, which metrics.jsonl has as null, and of skipped steps.
    """

    name: str
    training: list[tuple[float, float]]
    held_out: list[tuple[float, float]]
    lost: list[float]


def read_curve(
    name: str, records: Sequence[Mapping[str, Any]], *, x: str, y: str, flops_per_token: float = math.nan
) -> Curve:
    """The curves of `y` over `x` (a key of `X_AXES`) in a run's records: on training text, and on held-out text."""
    training_key, held_out_key = ("", y) if y.startswith(_HELD_OUT) else (y, _HELD_OUT + y)
    training: list[tuple[float, float]] = []
    held_out: list[tuple[float, float]] = []
    lost: list[float] = []
    tokens, seconds = 0, 0.0
    for record in records:
        tokens, seconds = record.get("tokens", tokens), record.get("elapsed", seconds)
        places = {"step": record["step"], "tokens": tokens, "flops": tokens * flops_per_token, "time": seconds / 60}
        if "skipped" in record and y in ("loss", "bits_per_byte"):
            lost.append(places[x])
        for key, points in ((training_key, training), (held_out_key, held_out)):
            value = record.get(key)
            if isinstance(value, int | float) and math.isfinite(value):
                points.append((places[x], value))
            elif key in record:
                lost.append(places[x])
    return Curve(name=name, training=training, held_out=held_out, lost=lost)


def plot_runs(curves: Sequence[Curve], picture: Path, *, x: str, y: str, note: str = "") -> None:
    """Draw each run in its own colour: training records faint, smoothed bold; evaluations as round marks.

    Crosses at the upper edge show where a value was not finite. note: what to know of the comparison, below the title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    seen = [value for index, curve in enumerate(curves) for value in _draw(axes, curve, index)]
    margin = 0.05 * (max(seen) - min(seen)) or 0.05 * abs(max(seen)) or 1.0
    axes.set_ylim(min(seen) - margin, max(seen) + margin)
    axes.set(xlabel=X_AXES[x], ylabel=y.replace("_", " ") + _UNITS.get(y, ""))
    axes.set_title(y.replace("_", " ") + (f"\n{note}" if note else ""), fontsize=11)
    if x != "time":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _explain_marks(axes, curves, y)
    axes.legend(frameon=False)
    figure.savefig(picture)


def _draw(axes: Any, curve: Curve, index: int) -> list[float]:
    """Draw one run; returns the values that the y-axis has to cover."""
    colour, line = _COLOURS[index % len(_COLOURS)], _LINES[index // len(_COLOURS) % len(_LINES)]
    label: str | None = as_text(curve.name)
    seen: list[float] = []
    if curve.training:
        places, values = zip(*curve.training, strict=True)
        smoothed = smooth(values)
        axes.plot(places, values, color=colour, alpha=0.15, linewidth=0.6)
        axes.plot(places, smoothed, _dots(places) + line, color=colour, linewidth=1.6, label=label)
        seen += smoothed[int(_START * len(smoothed)) :]
        label = None
    if curve.held_out:
        style = "o" if curve.training else f"o{line}"
        axes.plot(*zip(*curve.held_out, strict=True), style, color=colour, label=label, **_MARK)
        seen += [value for _, value in curve.held_out]
    if curve.lost:
        edge = axes.get_xaxis_transform()  # y from 0 to 1, whatever the values
        axes.plot(curve.lost, [0.985] * len(curve.lost), "x", color=colour, markersize=6, transform=edge)
    return seen


def _explain_marks(axes: Any, curves: Sequence[Curve], y: str) -> None:
    """Add to the legend what lines, round marks and crosses are, where there are any."""
    trained, lost = any(curve.training for curve in curves), any(curve.lost for curve in curves)
    held_out = any(curve.held_out for curve in curves)
    if trained and held_out:
        axes.plot([], [], "-", color=_GREY, linewidth=1.6, label="lines (squares if few): training text, smoothed")
    if held_out and not y.startswith(_HELD_OUT):
        axes.plot([], [], "o", color=_GREY, label="round marks: held-out text", **_MARK)
    if lost:
        axes.plot([], [], "x", color=_GREY, markersize=6, label="crosses: not finite, or a skipped step")


def _dots(places: Sequence[float]) -> str:
    """The marker of a curve of few points, which a line would hardly show, "" for a longer one."""
    return "s" if len(places) <= _FEW else ""


def smooth(values: Sequence[float]) -> list[float]:
    """Centred moving average. On either side it reaches over a tenth of the way so far, at most 3 % of all values.

    Centred, so that a falling curve does not lag; narrow at first, where the curve falls fast.
    """
    total = np.concatenate([[0.0], np.cumsum(values)])
    index, count = np.arange(len(values)), len(values)
    reach = np.minimum(index // 10, count * 3 // 100)
    first, end = index - reach, np.minimum(index + reach + 1, count)
    return ((total[end] - total[first]) / (end - first)).tolist()
