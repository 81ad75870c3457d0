"""loss.png: the run at a glance."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from swamla.train.tracking import read_metrics


def plot_losses(metrics_file: Path, picture: Path, *, title: str, bits_per_nat: float) -> None:
    """Draw training loss (each record faint, smoothed strong) and held-out loss over steps.

    bits_per_nat: factor from nats per token to bits per byte, for the axis on the right.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(metrics_file)
    training = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    held_out = [(r["step"], r["held_out_loss"]) for r in records if r.get("held_out_loss") is not None]
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
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    bits = (lambda nats: np.multiply(nats, bits_per_nat), lambda bits: np.divide(bits, bits_per_nat))
    right = axes.secondary_yaxis("right", functions=bits)
    right.set_ylabel("bits per byte")
    axes.grid(alpha=0.25)
    axes.spines[["top"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(picture)


def smooth(values: Sequence[float]) -> list[float]:
    """Each value's mean with its neighbours: a tenth of the way so far, at most 3 % of all, on either side.

    Centred, so that a falling curve is not shown too high; narrow at first, where it falls fast.
    """
    total = np.concatenate([[0.0], np.cumsum(values)])
    index, count = np.arange(len(values)), len(values)
    reach = np.minimum(index // 10, count * 3 // 100)
    first, end = index - reach, np.minimum(index + reach + 1, count)
    return ((total[end] - total[first]) / (end - first)).tolist()
